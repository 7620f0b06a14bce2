"""The embedded corpus as a shard set: planned at once, written by a background process while training already reads.

What a set holds follows from its identity, so the folder's name is a hash of it and any run may go on with what
another left unfinished. A subset's shards are written once some run has asked for the subset.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from avlit.errors import UserError
from data.captions import STYLES
from data.clip import SUBSETS
from data.corpus import CorpusSettings, make_clip
from data.corpus import identity as corpus_identity
from data.live_writer import LOG_NAME, WriterLock
from data.manifest import MANIFEST, Manifest, Shard, check_same_identity, read_manifest
from data.sample import CONTROLS, EncodedSample
from data.shard_writer import write_shard

if TYPE_CHECKING:  # the command that starts the writer has not imported torch yet, and must not wait for it
    from data.encode import Encoders

HELDOUT_START = 1_000_000
"""Index of the first held-out clip; training clips have the indices below."""

SHARD_SIZES = {"train": (32, 64), "heldout": (16, 64)}
"""Clips of a subset's first shard and of every further one: a run can start as soon as the small ones are there."""

REFERENCE_TOKENS = 96
"""Most latents of a reference sound that are stored, 1.5 s; a run reads as many as its model takes."""

_REPOSITORY = Path(__file__).resolve().parents[1]
_SOURCES = ("data/corpus/*.py", "data/captions.py", "data/encode.py", "data/sample.py", "avlit/codecs/embedded_*.py")


@dataclass(frozen=True)
class EmbeddedSet:
    """What decides the contents of an embedded shard set: settings, clips of each subset, seed, and the code itself.

    has_frames: False is a set of sound without picture. controls: those of CONTROLS that its samples hold.
    """

    settings: CorpusSettings
    num_clips: int
    heldout_clips: int
    seed: int = 0
    has_frames: bool = True
    controls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, value in (("data.num_clips", self.num_clips), ("data.heldout_clips", self.heldout_clips)):
            if not 1 <= value <= HELDOUT_START:
                raise UserError(f"{key}={value}: the embedded corpus holds 1 to {HELDOUT_START} clips of each subset")

    @property
    def name(self) -> str:
        """The set's folder: another one for other settings and for a changed corpus or codec."""
        described = json.dumps({**asdict(self), "source": source_hash(), "shard_sizes": SHARD_SIZES}, sort_keys=True)
        return f"embedded-{hashlib.sha256(described.encode()).hexdigest()[:12]}"

    def plan(self, encoders: "Encoders") -> Manifest:
        """The manifest of the whole set, of all subsets, before anything is written."""
        settings = self.settings
        identity = {
            **self._used(encoders).identity(fps=settings.fps, rate_hz=settings.rate_hz),
            "corpus": corpus_identity(settings),
            "corpus_seed": self.seed,
            "corpus_source": source_hash(),
        }
        shape = f"{settings.num_frames}x{settings.height}x{settings.width}"
        if not self.has_frames:
            shape = f"{round(1000 * settings.num_samples / settings.rate_hz)}ms"
        shards = [
            Shard(f"{subset}-{split}-{number:06d}", split, subset, stop - start, shape)
            for subset in SUBSETS
            for split, count in (("heldout", self.heldout_clips), ("train", self.num_clips))
            for number, (start, stop) in enumerate(_ranges(split, count))
        ]
        return Manifest(identity, tuple(shards), growing=True)

    def samples(self, shard: Shard, encoders: "Encoders") -> Iterator[EncodedSample]:
        """The clips of a planned shard, made and encoded one by one."""
        from data.encode import encode_clip

        count = self.num_clips if shard.split == "train" else self.heldout_clips
        start, stop = _ranges(shard.split, count)[_number(shard)]
        first = 0 if shard.split == "train" else HELDOUT_START
        for index in range(first + start, first + stop):
            clip = make_clip(
                shard.subset, index, self.settings, self.seed, has_frames=self.has_frames, controls=self.controls
            )
            yield encode_clip(clip, self._used(encoders), source=f"embedded corpus, {shard.subset} {index}")

    def _used(self, encoders: "Encoders") -> "Encoders":
        return replace(encoders, controls=self.controls) if self.has_frames else encoders.without_picture()


def ensure_embedded(
    cache_dir: Path | str,
    *,
    settings: CorpusSettings,
    subsets: Sequence[str],
    num_clips: int,
    heldout_clips: int = 64,
    seed: int = 0,
    has_frames: bool = True,
    controls: Sequence[str] = (),
) -> Path:
    """The folder of the embedded shard set, with a background process writing what `subsets` still lack.

    num_clips, heldout_clips: clips of each subset. has_frames: False for sound without picture. controls: those of
    CONTROLS that are made, in any order; a set without them is written in less time.
    Returns at once; `ShardSet` waits for the shards that it reads.
    Two runs at the same time share one writer, and a run goes on with what a killed writer left.
    Raises ValueError for an unknown subset or a number of clips that the corpus does not have.
    """
    for subset in subsets:
        if subset not in SUBSETS:
            raise UserError(f"data.subsets.{subset}: the embedded corpus has {', '.join(SUBSETS)}")
    made = tuple(name for name in CONTROLS if name in controls)
    embedded = EmbeddedSet(settings, num_clips, heldout_clips, seed, has_frames, made)
    root = Path(cache_dir).resolve() / embedded.name
    root.mkdir(parents=True, exist_ok=True)
    for subset in subsets:
        (root / f"wanted-{subset}").touch()  # before the lock is tried: a writer looks again after it let go
    if (root / MANIFEST).exists() and not missing(root, read_manifest(root)):
        return root
    lock = WriterLock.acquire(root)
    if lock is not None:
        _start_writer(root, embedded, lock)
    return root


def missing(root: Path, manifest: Manifest) -> list[Shard]:
    """The shards that some run wants and that are not there, in the order of writing.

    First shards come first, of each subset its held-out ones before those for training: what a run reads first.
    """
    shards = [
        shard
        for shard in manifest.shards
        if (root / f"wanted-{shard.subset}").exists() and not (root / f"{shard.name}.tar").exists()
    ]
    return sorted(shards, key=lambda shard: (_number(shard), shard.split != "heldout"))


def write_missing(root: Path, embedded: EmbeddedSet, encoders: "Encoders", lock: WriterLock) -> None:
    """Writes the wanted shards under `lock`, which it releases; ends when none is missing or another writer is on."""
    manifest = embedded.plan(encoders)
    if (root / MANIFEST).exists():
        check_same_identity(root, read_manifest(root).identity, manifest.identity, whose="this run has")
    else:
        manifest.write(root)
    holding: WriterLock | None = lock
    while holding is not None:
        with holding:
            for leftover in root.glob(".*.tmp"):  # of a writer that was killed
                leftover.unlink()
            while shards := missing(root, manifest):
                write_shard(root, shards[0].name, manifest.identity, embedded.samples(shards[0], encoders))
        holding = WriterLock.acquire(root) if missing(root, manifest) else None


def source_hash() -> str:
    """A hash of the code that decides what clips look and sound like, and how they are encoded."""
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(_REPOSITORY.glob(pattern)):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def embedded_encoders() -> "Encoders":
    """The codecs without weights, imported without those that need diffusers: the first clip must not wait for that."""
    from avlit.codecs.embedded_audio import EmbeddedAudioCodec, EmbeddedTrackEncoder
    from avlit.codecs.embedded_text import EmbeddedTextEncoder
    from avlit.codecs.embedded_video import EmbeddedVideoCodec
    from data.encode import Encoders

    return Encoders(
        text=EmbeddedTextEncoder(),
        video=EmbeddedVideoCodec(),
        audio=EmbeddedAudioCodec(),
        tracks=EmbeddedTrackEncoder(),
        captions=tuple(style for style in STYLES if style != "structured"),
        reference_tokens=REFERENCE_TOKENS,
    )


def main(words: Sequence[str]) -> None:
    """The background process: `python -m data.embedded ROOT LOCK_DESCRIPTOR JSON`."""
    import torch

    root, descriptor, described = words
    os.nice(10)  # training comes first; the writer takes what is left of the processor
    torch.set_num_threads(1)
    values = json.loads(described)
    values |= {"settings": CorpusSettings(**values["settings"]), "controls": tuple(values["controls"])}
    embedded = EmbeddedSet(**values)
    write_missing(Path(root), embedded, embedded_encoders(), WriterLock(Path(root), int(descriptor)))


def _start_writer(root: Path, embedded: EmbeddedSet, lock: WriterLock) -> None:
    """Hands the lock to a process of its own session, so that an interrupted run does not end it for another."""
    command = [sys.executable, "-m", "data.embedded", str(root), str(lock.descriptor), json.dumps(asdict(embedded))]
    with (root / LOG_NAME).open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=_REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(lock.descriptor,),
            start_new_session=True,
        )
    lock.release()
    threading.Thread(target=process.wait, daemon=True).start()  # takes note of its end; nobody waits for that


def _ranges(split: str, count: int) -> list[tuple[int, int]]:
    first, further = SHARD_SIZES[split]
    starts = [0, *range(first, count, further)]
    return list(zip(starts, [*starts[1:], count], strict=True))


def _number(shard: Shard) -> int:
    return int(shard.name.rsplit("-", 1)[1])


if __name__ == "__main__":
    main(sys.argv[1:])
