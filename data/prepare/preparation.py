"""From a folder of clips to a committed shard set: finds, describes, cuts, encodes, splits, writes and reports."""

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from avlit.durable import sync_folder
from avlit.errors import UserError
from avlit.timing import Timing
from data.captions import PROMPT
from data.clip import RawClip
from data.encode import Encoders, encode_clip
from data.live_writer import LOCK_NAME, is_written
from data.prepare.annotations import Descriptions
from data.prepare.config import check_out
from data.prepare.controls import Annotator, ClipControls, controls_there
from data.prepare.descriptions import Description, Rejected
from data.prepare.mouths import MouthFinder
from data.prepare.names import NamePattern
from data.prepare.own_reference import OwnReferences, own_references
from data.prepare.references import ROUNDING_S, ReferencePool, Utterance
from data.prepare.report import FileReport, Report
from data.prepare.separation import Separator
from data.prepare.sounds import SoundWindows
from data.prepare.sources import CLIP_SUFFIXES, SOUND_SUFFIXES, choose_clips, content
from data.prepare.splits import Splitter
from data.prepare.windows import ClipWindows
from data.sample import CONTROLS, check_sample
from data.shards import ShardWriter

MAX_SLUG = 40
"""Keys are at most 80 characters: a subset, this, a hash and a number."""


class NothingKeptError(UserError):
    """Not one window could be used; `report` says of every file why."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Preparation:
    """How clips are chosen, cut, split and named. stride_frames: from one window's start to the next.

    include: glob on file names without suffix. pattern: reads those names. length_step_s: sound is prepared without
    picture, with silence up to a multiple of this; None prepares clips. own_reference: reference voices are cut from a
    clip's own file, apart from the window. free_prompts: see `Description.with_prompt`.
    """

    timing: Timing
    stride_frames: int
    heldout: float
    default_subset: str
    shard_samples: int
    include: str = "*"
    pattern: NamePattern | None = None
    length_step_s: float | None = None
    own_reference: bool = False
    free_prompts: bool = False

    @property
    def has_picture(self) -> bool:
        """Whether samples hold a picture."""
        return self.length_step_s is None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What counts as a media file."""
        return CLIP_SUFFIXES if self.has_picture else SOUND_SUFFIXES


def choose(source: Path, *, captions: Path | None, how: Preparation) -> tuple[list[Path], list[Path], Descriptions]:
    """All media files in `source`, those of them that are asked for, and what is said of them.

    Raises UserError where there are none of the first or of the second.
    """
    there, clips = choose_clips(source, suffixes=how.suffixes, include=how.include)
    descriptions = Descriptions(
        there,
        source=source,
        jsonl=captions,
        default_subset=how.default_subset,
        pattern=how.pattern,
        has_picture=how.has_picture,
    )
    return there, clips, descriptions


def prepare(
    source: Path,
    out: Path,
    *,
    captions: Path | None,
    how: Preparation,
    encoders: Encoders,
    separator: Separator | None,
    mouths: MouthFinder | None = None,
    annotators: Sequence[Annotator] = (),
    settings: dict[str, object],
    progress: bool = True,
) -> Report:
    """Writes the shard set `out` from the clips in `source`, complete or not at all, with its report.

    separator: makes the tracks of clips without stems; None where the recipe reads no tracks. mouths: finds the mouths
    of clips with a picture. annotators: make the controls of clips that have no file for them. settings: what is
    recorded in the report. Raises UserError where `source` has no clips or `out` is not empty, and NothingKeptError
    where no window is kept; a file that cannot be used is reported and never ends the preparation.
    """
    files, clips, descriptions = choose(source, captions=captions, how=how)
    report = Report(settings, problems=descriptions.problems, passed_over=len(files) - len(clips))
    report.styles = encoders.captions
    report.mouth_finder = mouths.name if mouths and how.has_picture else ""
    usable = _described(clips, source, descriptions, report)
    there = controls_there((path for path, _ in usable.values()), encoders.controls, annotators)
    report.no_controls = tuple(name for name in encoders.controls if name not in there)
    encoders = replace(encoders, controls=there)  # a set says of itself what it has
    splitter = Splitter(
        {name: description.subsets for name, (_, description) in usable.items()},
        how.heldout,
        speakers={name: each.speaker for name, (_, each) in usable.items()} if encoders.reference_tokens else None,
        are_utterances=not how.has_picture,
    )
    pool, last = ReferencePool(reference_tokens=0 if how.own_reference else encoders.reference_tokens), ""
    slugs = _slugs(usable)
    identity = encoders.identity(fps=how.timing.fps, rate_hz=how.timing.rate_hz)
    with _committed(out) as folder:
        with ShardWriter(folder, identity, samples_per_shard=how.shard_samples) as writer:
            for name in tqdm(splitter.order, desc="prepare", unit="clip", disable=not progress):
                if splitter.speaker(name) != last:
                    _write(writer, pool.flush())
                    last = splitter.speaker(name)
                path, description = usable[name]
                file = FileReport(name, description.subsets, description.speaker)
                report.files.append(file)
                held_windows = 0
                try:
                    windows = _windows(path, how, separator, mouths)
                    file.tracks = windows.tracks
                    controls = None
                    if encoders.controls:
                        names = encoders.controls
                        controls = ClipControls(path, names=names, timing=how.timing, annotators=annotators)
                    references = None
                    if how.own_reference:
                        references = own_references(
                            path, encoders, rate_hz=how.timing.rate_hz, duration_s=windows.duration_s,
                            is_one_voice=description.is_one_voice, only_before="tail" in splitter.mode(name),
                        )  # fmt: skip
                    utterances = _utterances(
                        windows, file, description, slugs[name], how, encoders, controls=controls, references=references
                    )
                    for utterance in _split(utterances, file, splitter, how):
                        held_windows += utterance.split == "heldout"
                        _write(writer, pool.add(utterance))
                    file.notes += windows.notes
                except Rejected as rejected:
                    file.rejected = str(rejected)
                splitter.note(name, held_windows=held_windows)
            _write(writer, pool.flush())
            for file in report.files:
                if not file.kept and file.rejected is None:
                    file.rejected = "; ".join(f"{why} ({count} of its windows)" for why, count in file.left_out.items())
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
            if (twin := by_content.setdefault(content(clip), name)) != name:
                raise Rejected(f"the same file as {twin}")
            usable[name] = clip, description
        except Rejected as rejected:
            report.files.append(FileReport(name, rejected=str(rejected)))
    return usable


def _windows(
    path: Path, how: Preparation, separator: Separator | None, mouths: MouthFinder | None
) -> ClipWindows | SoundWindows:
    if how.length_step_s is not None:
        return SoundWindows(path, timing=how.timing, length_step_s=how.length_step_s)
    return ClipWindows(path, timing=how.timing, stride_frames=how.stride_frames, separator=separator, mouths=mouths)


def _utterances(
    windows: ClipWindows | SoundWindows,
    file: FileReport,
    description: Description,
    slug: str,
    how: Preparation,
    encoders: Encoders,
    *,
    controls: ClipControls | None,
    references: OwnReferences | None,
) -> Iterator[Utterance]:
    """The encoded windows of a file, of its first subset; windows that cannot be used are counted with their reason."""
    whole = _of_windows(description, windows, file, how)
    is_cut = False
    for window in windows.read():
        if isinstance(window, Rejected):
            _leave_out(file, str(window))
            continue
        description = whole
        if windows.is_cut and whole.words:
            description = whole.in_window(window.start_s, window.end_s)
        if PROMPT in encoders.captions:
            description = description.with_prompt(free=how.free_prompts)
        try:
            sounds, borrowed_until_s = references.of_window(window.start_s, window.end_s) if references else ((), 0.0)
            pictures: dict[str, Any] = controls.of_window(window) if controls else {}
        except Rejected as rejected:
            _leave_out(file, str(rejected))
            continue
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
            transcript=description.transcript,
            mouth_boxes=window.mouth_boxes,
            captions=dict(description.captions),
            references=sounds,
            **pictures,
        )
        source = [
            f"{file.file} {window.start_s:.2f}-{window.end_s:.2f} s",
            windows.tracks and f"tracks: {windows.tracks}",
            file.speaker and f"speaker: {file.speaker}",
            *(f"{name}: {origin}" for name, origin in (controls.origins if controls else {}).items()),
            description.origin,
        ]
        sample = encode_clip(clip, encoders, source="; ".join(part for part in source if part))
        if not is_cut and max(map(len, sample.texts.values())) >= encoders.text.max_tokens:
            is_cut = True
            file.notes.append(f"its caption fills the text encoder's {encoders.text.max_tokens} tokens, more is cut")
        try:
            check_sample(sample)
        except ValueError as error:  # not finite
            _leave_out(file, _problem(error))
            continue
        num_latents = 0 if encoders.audio is None else encoders.audio.num_latents(window.end_s - window.start_s)
        yield Utterance(
            sample, "", file, window.start_s, window.end_s, num_latents, description.is_one_voice, borrowed_until_s
        )


def _of_windows(
    description: Description, windows: ClipWindows | SoundWindows, file: FileReport, how: Preparation
) -> Description:
    """A file's description without what holds for the whole of it only, where its windows hold less."""
    if not windows.is_cut or not description.holds_words or description.words:
        return description
    if description.is_verbatim:
        raise Rejected(
            f"{windows.duration_s:.2f} s, longer than the recipe's {how.timing.duration_s:.2f} s, and its caption is "
            "its transcript, which no part of it says; give it a caption, cut it, or raise data.num_frames"
        )
    file.notes.append("its transcript is the whole clip's and is left out of the windows")
    return description.without_words()


def _split(
    utterances: Iterator[Utterance], file: FileReport, splitter: Splitter, how: Preparation
) -> Iterator[Utterance]:
    """Each sample with its split; those between the splits of a file are counted as left out."""
    mode = splitter.mode(file.file)
    if mode in ("train", "heldout"):
        yield from (replace(utterance, split=mode) for utterance in utterances)
        return
    gap = -(-how.timing.num_frames // how.stride_frames) - 1  # windows that share frames with the first held-out one
    borrowing: list[Utterance] = []  # for training, if what they borrow their voice from is not held out
    for split, utterance in splitter.cut_tail(utterances, gap=gap, at_least_one=mode == "longer_tail"):
        if split == "gap":
            _leave_out(file, "overlaps the held-out windows")
            continue
        if split == "heldout":
            late = [each for each in borrowing if each.borrowed_until_s > utterance.start_s + ROUNDING_S]
            borrowing = [each for each in borrowing if each not in late]
            for _ in late:
                _leave_out(file, "its only reference voice is in the held-out windows")
        if split == "train" and utterance.borrowed_until_s > utterance.end_s:
            borrowing.append(utterance)
        else:
            yield replace(utterance, split=split)
    yield from (replace(utterance, split="train") for utterance in borrowing)


def _write(writer: ShardWriter, utterances: Iterable[Utterance]) -> None:
    """Writes each sample to each of its file's subsets, encoded once."""
    for utterance in utterances:
        sample, file = utterance.sample, utterance.file
        try:
            for subset in file.subsets:
                annotation = replace(sample.annotation, subset=subset)
                copy = replace(sample, key=f"{subset}-{sample.key}", annotation=annotation)
                writer.add(subset, utterance.split, copy)
        except ValueError as error:  # beyond the range of what shards store
            _leave_out(file, _problem(error))
            continue
        _count(file.kept, utterance.split)
        _count(file.shapes, sample.annotation.shape)
        file.frames += sample.annotation.num_frames
        file.frames_with_mouth += sum(map(bool, sample.annotation.mouth_boxes))
        for style in sample.annotation.captions:
            _count(file.captions, style)
        for name in CONTROLS:
            if getattr(sample, name) is not None:
                _count(file.controls, name)
        if writer.manifest.identity.get("reference_tokens"):
            _count(file.references, str(len(sample.references)))


def _leave_out(file: FileReport, reason: str) -> None:
    _count(file.left_out, reason)


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


def _problem(error: ValueError) -> str:
    """What is wrong with a sample, without its key."""
    return str(error).partition(": ")[2]


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
