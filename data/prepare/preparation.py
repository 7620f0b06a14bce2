"""From a folder of clips to a committed shard set: finds, describes, cuts, encodes, splits, writes and reports.

`mouth_boxes` of real clips stay empty: nothing here looks for faces yet.
"""

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import xxhash
from tqdm import tqdm

from avlit.durable import sync_folder
from avlit.errors import UserError
from avlit.timing import Timing
from data.clip import RawClip
from data.encode import Encoders, encode_clip
from data.live_writer import LOCK_NAME, is_written
from data.prepare.config import check_out
from data.prepare.descriptions import Description, Descriptions, Rejected
from data.prepare.report import FileReport, Report
from data.prepare.separation import Separator
from data.prepare.splits import Splitter
from data.prepare.windows import ClipWindows
from data.sample import CAPTION, EncodedSample
from data.shards import ShardWriter

SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv")

"""What counts as a media file."""

TRANSCRIPT_SLACK_S = 0.5
"""A window is given the clip's transcript if the clip is at most this much longer."""

MAX_SLUG = 40
"""Keys are at most 80 characters: a subset, this, a hash and a number."""


class NothingKeptError(UserError):
    """Not one window could be used; `report` says of every file why."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Preparation:
    """How clips are cut, split and named. stride_frames: from one window's start to the next."""

    timing: Timing
    stride_frames: int
    heldout: float
    default_subset: str
    shard_samples: int


def find_clips(source: Path) -> list[Path]:
    """Media files in `source` and its subfolders by suffix, in order; hidden files and folders are passed over."""
    return sorted(
        path
        for path in source.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
    )


def prepare(
    source: Path,
    out: Path,
    *,
    captions: Path | None,
    how: Preparation,
    encoders: Encoders,
    separator: Separator,
    settings: dict[str, object],
    progress: bool = True,
) -> Report:
    """Writes the shard set `out` from the clips in `source`, complete or not at all, with its report.

    settings: what is recorded in the report. Raises UserError where `source` has no clips or `out` is not empty, and
    NothingKeptError where no window is kept; a file that cannot be used is reported and never ends the preparation.
    """
    clips = find_clips(source)
    if not clips:
        raise UserError(f"source={source}: no media files there ({', '.join(SUFFIXES)})")
    descriptions = Descriptions(clips, source=source, jsonl=captions, default_subset=how.default_subset)
    report = Report(settings, problems=descriptions.problems)
    usable = _described(clips, source, descriptions, report)
    splitter = Splitter({name: description.subsets for name, (_, description) in usable.items()}, how.heldout)
    slugs = _slugs(usable)
    identity = encoders.identity(fps=how.timing.fps, rate_hz=how.timing.rate_hz)
    with _committed(out) as folder:
        with ShardWriter(folder, identity, samples_per_shard=how.shard_samples) as writer:
            for name in tqdm(splitter.order, desc="prepare", unit="clip", disable=not progress):
                path, description = usable[name]
                file = FileReport(name, description.subsets)
                report.files.append(file)
                try:
                    windows = ClipWindows(path, timing=how.timing, stride_frames=how.stride_frames, separator=separator)
                    file.tracks = windows.tracks
                    samples = _samples(windows, file, description, slugs[name], how, encoders)
                    for split, sample in _split(samples, file, splitter, how):
                        _add(writer, split, sample, file)
                    file.notes += windows.notes
                except Rejected as rejected:
                    file.rejected = str(rejected)
                if not file.kept and file.rejected is None:
                    file.rejected = "; ".join(f"{why} ({count} of its windows)" for why, count in file.left_out.items())
                splitter.note(name, held_windows=file.kept.get("heldout", 0))
        if not report.num_kept:
            raise NothingKeptError(f"source={source}: not one window of {len(clips)} files could be used", report)
        (folder / LOCK_NAME).unlink(missing_ok=True)
        report.write(folder)
    return report


def _described(
    clips: Sequence[Path], source: Path, descriptions: Descriptions, report: Report
) -> dict[str, tuple[Path, Description]]:
    """Name -> (file, description) of the clips that have a caption and are no copy of another; the rest is reported."""
    usable: dict[str, tuple[Path, Description]] = {}
    by_content: dict[str, str] = {}
    for clip in clips:
        name = clip.relative_to(source).as_posix()
        try:
            description = descriptions.of(clip)
            if (twin := by_content.setdefault(_content(clip), name)) != name:
                raise Rejected(f"the same file as {twin}")
            usable[name] = clip, description
        except Rejected as rejected:
            report.files.append(FileReport(name, rejected=str(rejected)))
    return usable


def _samples(
    windows: ClipWindows,
    file: FileReport,
    description: Description,
    slug: str,
    how: Preparation,
    encoders: Encoders,
) -> Iterator[EncodedSample]:
    """The encoded windows of a file, of its first subset; windows that cannot be used are counted with their reason."""
    transcript = description.transcript
    if transcript and windows.duration_s > how.timing.duration_s + TRANSCRIPT_SLACK_S:
        transcript = ""
        file.notes.append("its transcript is the whole clip's and is left out of the windows")
    is_cut = False
    for window in windows.read():
        if isinstance(window, Rejected):
            _leave_out(file, str(window))
            continue
        end_s = window.start_s + how.timing.duration_s
        source = f"{file.file} {window.start_s:.2f}-{end_s:.2f} s; tracks: {windows.tracks}"
        clip = RawClip(
            key=f"{slug}-{window.number:05d}",
            subset=description.subsets[0],
            fps=how.timing.fps,
            rate_hz=how.timing.rate_hz,
            frames=window.frames,
            speech=window.speech,
            effects=window.effects,
            music=window.music,
            speech_second=window.speech_second,
            caption=description.caption,
            transcript=transcript,
            mouth_boxes=[[] for _ in window.frames],
        )
        source = f"{source}; {description.origin}" if description.origin else source
        sample = encode_clip(clip, encoders, source=source)
        if not is_cut and len(sample.texts[CAPTION]) >= encoders.text.max_tokens:
            is_cut = True
            file.notes.append(f"its caption fills the text encoder's {encoders.text.max_tokens} tokens, more is cut")
        yield sample


def _split(
    samples: Iterator[EncodedSample], file: FileReport, splitter: Splitter, how: Preparation
) -> Iterator[tuple[str, EncodedSample]]:
    """Each sample with its split; those between the splits of a file are counted as left out."""
    mode = splitter.mode(file.file)
    if mode in ("train", "heldout"):
        yield from ((mode, sample) for sample in samples)
        return
    gap = -(-how.timing.num_frames // how.stride_frames) - 1  # windows that share frames with the first held-out one
    for split, sample in splitter.cut_tail(samples, gap=gap, at_least_one=mode == "longer_tail"):
        if split == "gap":
            _leave_out(file, "overlaps the held-out windows")
        else:
            yield split, sample


def _add(writer: ShardWriter, split: str, sample: EncodedSample, file: FileReport) -> None:
    """Writes a sample to each of its subsets, encoded once."""
    try:
        for subset in file.subsets:
            annotation = replace(sample.annotation, subset=subset)
            writer.add(subset, split, replace(sample, key=f"{subset}-{sample.key}", annotation=annotation))
    except ValueError as error:  # not finite, or beyond the range of what shards store
        _leave_out(file, str(error).partition(": ")[2])
    else:
        file.kept[split] = file.kept.get(split, 0) + 1


def _leave_out(file: FileReport, reason: str) -> None:
    file.left_out[reason] = file.left_out.get(reason, 0) + 1


def _content(path: Path) -> str:
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as data:
            while block := data.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise Rejected(f"cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _slugs(names: Iterable[str]) -> dict[str, str]:
    """File name -> what its keys are made from: its letters and digits, with a hash where they are not the name."""
    stems = {name: str(PurePosixPath(name).with_suffix("")) for name in names}
    plain = {name: re.sub(r"[^A-Za-z0-9_-]", "-", stem)[:MAX_SLUG] for name, stem in stems.items()}
    times = Counter(plain.values())
    return {
        name: slug
        if slug == stems[name] and times[slug] == 1
        else f"{slug}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
        for name, slug in plain.items()
    }


@contextmanager
def _committed(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which becomes `out` if all goes well, and is removed if not."""
    try:
        check_out(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        for leftover in out.parent.glob(f".{out.name}.unfinished-*"):  # of a preparation that was killed
            if not is_written(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
        folder = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
        folder.mkdir()
        try:
            yield folder
            check_out(out)
            folder.replace(out)
            sync_folder(out.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written ({error.strerror}: {error.filename})") from error
