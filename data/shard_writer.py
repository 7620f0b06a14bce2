"""Writes shard sets: webdataset's tar layout, an index before each tar, a manifest after it; nothing is half there."""

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from avlit.durable import sync_folder, write_atomically
from data.live_writer import WriterLock
from data.manifest import MANIFEST, SPLITS, Identity, Manifest, Shard, check_same_identity, read_manifest, seal
from data.sample import EncodedSample, pack, required_fields
from data.shard_index import ShardError, index_path, index_tar, parse_index


class ShardWriter:
    """Adds samples to the shard set in `root`, a new one or one of the same identity.

    identity must hold `fps` and `rate_hz`, which every sample is checked against, besides what names the codecs.
    Samples of a subset, split and shape fill one shard until it has `samples_per_shard` or `max_bytes`.
    Shards that are complete stay, whatever happens later; samples added before an error are kept as well.
    Raises ShardError for another identity, for a second writer, ValueError for a sample that must not get in.
    """

    def __init__(
        self, root: Path | str, identity: Identity, *, samples_per_shard: int = 256, max_bytes: int = 1 << 29
    ) -> None:
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        check_rates(identity)
        lock = WriterLock.acquire(self.root)
        if lock is None:
            raise ShardError(f"out={self.root}: another process is writing there")
        self._lock = lock
        self._limits = samples_per_shard, max_bytes
        self._open: dict[tuple[str, str, str], TarShard] = {}
        try:
            self.manifest = self._existing(identity)
            self.keys = {key for shard in self.manifest.shards for key in self._keys_of(shard)}
        except ValueError:
            lock.release()
            raise
        for leftover in self.root.glob(".*.tmp"):  # of a writer that was killed; the lock says it is gone
            leftover.unlink()

    def add(self, subset: str, split: str, sample: EncodedSample) -> None:
        """Puts one sample in; ValueError names its key and what is wrong with it."""
        if sample.key in self.keys:
            raise ValueError(f"sample {sample.key}: the set in {self.root} already has this key")
        place = subset, split, sample.annotation.shape
        shard = self._open.get(place)
        if shard is None:
            shard = self._open[place] = TarShard(self.root, self._next_name(subset, split), self.manifest.identity)
        shard.add(sample)
        self.keys.add(sample.key)
        if len(shard) >= self._limits[0] or shard.size >= self._limits[1]:
            self._finish(place)

    def close(self) -> None:
        """Completes every open shard and gives the folder free."""
        for place in list(self._open):
            self._finish(place)
        if not (self.root / MANIFEST).exists():
            self.manifest.write(self.root)
        self._lock.release()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is not None and issubclass(kind, OSError):  # a full disk would only fail again
            for shard in self._open.values():
                shard.abandon()
            self._lock.release()
        else:
            self.close()

    def _existing(self, identity: Identity) -> Manifest:
        if not (self.root / MANIFEST).exists():
            return Manifest(identity, ())
        manifest = read_manifest(self.root)
        check_same_identity(self.root, manifest.identity, identity, whose="this run has")
        if manifest.growing:
            raise ShardError(f"out={self.root}: holds the embedded corpus; choose another folder")
        return manifest

    def _keys_of(self, shard: Shard) -> list[str]:
        path = index_path(self.root / f"{shard.name}.tar")
        try:
            return [sample.key for sample in parse_index(path.read_bytes()).samples]
        except (OSError, ValueError) as error:
            raise ShardError(f"{path}: the index cannot be read ({error}); the set cannot be added to") from error

    def _next_name(self, subset: str, split: str) -> str:
        taken = {shard.name for shard in self.manifest.shards} | {shard.name for shard in self._open.values()}
        number = 0
        while (name := f"{subset}-{split}-{number:06d}") in taken:
            number += 1
        return name

    def _finish(self, place: tuple[str, str, str]) -> None:
        shard = self._open.pop(place).finish()
        self.manifest = Manifest(self.manifest.identity, (*self.manifest.shards, shard))
        self.manifest.write(self.root)


class TarShard:
    """One shard while it is written, under a temporary name until it is complete and on the disk."""

    def __init__(self, root: Path, name: str, identity: Identity) -> None:
        from webdataset.writer import TarWriter

        self.name, self._identity = name, identity
        self._subset, self._split, _ = name.rsplit("-", 2)
        if self._split not in SPLITS:
            raise ValueError(f"split {self._split!r}: one of {', '.join(SPLITS)}")
        self._tar, self._temporary = root / f"{name}.tar", root / f".{name}.{os.getpid()}.tmp"
        self._file: BinaryIO = self._temporary.open("wb")
        self._writer = TarWriter(self._file, encoder=False, mtime=0)  # no times: same samples, same bytes
        self._shape, self._count = "", 0

    def __len__(self) -> int:
        return self._count

    @property
    def size(self) -> int:
        """Bytes written so far, roughly."""
        return self._file.tell()

    def add(self, sample: EncodedSample) -> None:
        """Appends a sample; ValueError names its key and what is wrong with it, and leaves the shard as it was."""
        annotation = sample.annotation
        for key, value in (("fps", annotation.fps), ("rate_hz", annotation.rate_hz)):
            if value != self._identity[key]:
                raise ValueError(f"sample {sample.key}: {key} is {value}, the shard set's is {self._identity[key]}")
        if lacking := [field for field in required_fields(self._identity) if field not in sample.arrays]:
            raise ValueError(f"sample {sample.key}: has no {lacking[0]}, which the set's identity promises")
        if annotation.subset != self._subset:
            raise ValueError(f"sample {sample.key}: of subset {annotation.subset!r} in a shard of {self._subset!r}")
        if self._count and annotation.shape != self._shape:
            raise ValueError(f"sample {sample.key}: of shape {annotation.shape} in a shard of {self._shape}")
        self._writer.write({"__key__": sample.key, **pack(sample)})
        self._shape = annotation.shape
        self._count += 1

    def finish(self) -> Shard:
        """Completes the shard: checked and indexed, index first, so that a tar that exists has its index."""
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = index_tar(self._temporary, name=self._tar.name, required=required_fields(self._identity))
        write_atomically(index_path(self._tar), index.to_json())
        self._temporary.replace(self._tar)
        sync_folder(self._tar.parent)
        shard = Shard(self.name, self._split, self._subset, len(index.samples), self._shape)
        return seal(shard, size=index.size, index=index.to_json())

    def abandon(self) -> None:
        """Gives up what was written so far."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def write_shard(root: Path, name: str, identity: Identity, samples: Iterable[EncodedSample]) -> Shard:
    """Writes the shard `name` of a planned set from its samples."""
    shard = TarShard(root, name, identity)
    try:
        for sample in samples:
            shard.add(sample)
        return shard.finish()
    finally:
        shard.abandon()


def check_rates(identity: Identity) -> None:
    """ValueError if a shard set's identity does not declare its rates."""
    for key in ("fps", "rate_hz"):
        if not isinstance(identity.get(key), int | float):
            raise ValueError(f"identity: {key} is missing; rates are declared, not assumed")
