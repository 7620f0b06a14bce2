"""Shard sets: folders of WebDataset tars with an index each and one manifest, read through the index by place.

`shards.json` names what made a set (codecs, encoders, rates), its subsets and its shards; `SUBSET-SPLIT-000000.tar` has
its index in `….tar.index.json`. Every byte that is used has been compared with its checksum once in this process.
"""

import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from data.live_writer import LOCK_NAME, wait_for
from data.manifest import MANIFEST, Identity, Manifest, Shard, check_identity, check_same_identity, read_manifest
from data.sample import (
    CAPTION,
    Annotation,
    DamagedSample,
    EncodedSample,
    required_fields,
    unpack_annotation,
    unpack_arrays,
    unpack_waveform,
)
from data.shard_index import Member, ShardError, ShardIndex, checksum, index_path, parse_index
from data.shard_writer import ShardWriter

__all__ = [
    "Annotation",
    "DamagedSample",
    "EncodedSample",
    "Identity",
    "Manifest",
    "Shard",
    "ShardError",
    "ShardSet",
    "ShardWriter",
]

_MAX_OPEN = 64


class ShardSet:
    """One or several shard folders of the same identity, read as one. Safe to share between threads, and picklable."""

    def __init__(self, roots: Sequence[Path], manifests: Sequence[Manifest]) -> None:
        self.roots, self.manifests = tuple(roots), tuple(manifests)
        pairs = [(root, m.growing, shard) for root, m in zip(roots, manifests, strict=True) for shard in m.shards]
        self.shards = tuple(shard for _, _, shard in pairs)
        self.identity = dict(manifests[0].identity)
        self._required = required_fields(self.identity)
        self._tars = [root / f"{shard.name}.tar" for root, _, shard in pairs]
        self._growing = [growing for _, growing, _ in pairs]
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, root: Path | str | Sequence[Path | str], expect: Mapping[str, object] | None = None) -> "ShardSet":
        """Opens `root` (one folder or several) and compares its identity with `expect`, the keys that matter.

        Several folders must have one identity, key for key. Raises ShardError naming the differing keys with both
        values. Waits for a set that is just being started.
        """
        roots = [_local(path) for path in ([root] if isinstance(root, str | Path) else root)]
        manifests = []
        for path in roots:
            if path.is_dir() and not (path / MANIFEST).exists() and (path / LOCK_NAME).exists():
                wait_for(path / MANIFEST)
            manifests.append(read_manifest(path))
            check_identity(path, manifests[-1].identity, expect or {})
            check_same_identity(path, manifests[-1].identity, manifests[0].identity, whose=f"those in {roots[0]} have")
        if not manifests:
            raise ShardError("data.root is empty: name at least one shard folder")
        return cls(roots, manifests)

    @property
    def subsets(self) -> tuple[str, ...]:
        """Subset names in the order of their first shard."""
        return tuple(dict.fromkeys(shard.subset for shard in self.shards))

    @property
    def is_growing(self) -> bool:
        """True if shards may still be written while they are read; their first pass then follows written order."""
        return any(self._growing)

    @property
    def manifest_hash(self) -> str:
        """Fingerprint of identity and contents: sha256 over the manifests, which hold every index's digest.

        Of a growing set, which is made deterministically, it covers the identity and the plan.
        """
        return hashlib.sha256(b"".join(manifest.to_json() for manifest in self.manifests)).hexdigest()

    def select(self, split: str) -> list[tuple[int, Shard]]:
        """The shards of a split with their numbers in this set."""
        return [(number, shard) for number, shard in enumerate(self.shards) if shard.split == split]

    def read(self, shard: int, index: int, *, sound: bool = False) -> EncodedSample:
        """Sample `index` of shard number `shard`; its waveform only with `sound`.

        Raises DamagedSample with shard, key and reason for whatever is wrong with the sample or its whole shard.
        """
        opened = self._opened(shard)
        entry, name = opened.index.samples[index], f"{self.shards[shard].name}.tar"
        extensions = ("flac", "json", "safetensors") if sound else ("json", "safetensors")
        try:
            members = [entry.members[extension] for extension in extensions]
            views = dict(zip(extensions, opened.members(members), strict=True))
            annotation = unpack_annotation(views["json"].data)
            self._check_place(annotation, self.shards[shard])  # before anything is decoded to the length it claims
            arrays = unpack_arrays(views["safetensors"], check_values=index not in opened.looked_through)
            waveform = unpack_waveform(views["flac"].data, annotation) if sound else None
            if lacking := [field for field in self._required if field not in arrays]:
                raise ValueError(f"field {lacking[0]} is missing")
            if unwritten := [field for field in arrays if not _has_caption(field, annotation)]:
                raise ValueError(f"field {unwritten[0]} is of no caption")
        except KeyError as error:
            raise DamagedSample(name, entry.key, f"member {entry.key}.{error.args[0]} is missing") from error
        except (ValueError, OSError) as error:
            raise DamagedSample(name, entry.key, str(error)) from error
        opened.looked_through.add(index)
        return EncodedSample.of_arrays(entry.key, annotation, arrays, waveform)

    def key(self, shard: int, index: int) -> str:
        """A sample's key for messages: from the index, or its number where the shard has none to read."""
        try:
            return self._opened(shard).index.samples[index].key
        except DamagedSample:
            return f"#{index}"

    def _check_place(self, annotation: Annotation, shard: Shard) -> None:
        for key, value in (("fps", annotation.fps), ("rate_hz", annotation.rate_hz)):
            if value != self.identity[key]:
                raise ValueError(f"{key} is {value}, the shard set's is {self.identity[key]}")
        if annotation.shape != shard.shape:
            raise ValueError(f"shape {annotation.shape} in a shard of {shard.shape}")

    def _opened(self, shard: int) -> "_OpenShard":
        with self._lock:
            if opened := self._open.get(shard):
                self._open.move_to_end(shard)
                return opened
        if self._growing[shard]:
            wait_for(self._tars[shard])
        opened = _OpenShard(self._tars[shard], self.shards[shard])
        with self._lock:
            self._open[shard] = opened
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)  # a reader that still holds it keeps its file open
        return opened

    def __getstate__(self) -> dict[str, object]:
        return {"roots": self.roots, "manifests": self.manifests}

    def __setstate__(self, state: dict[str, tuple]) -> None:
        self.__init__(state["roots"], state["manifests"])


class _OpenShard:
    """A shard's file, its index and which of its members have been compared with their checksums.

    Read by `pread`, not through a memory map: a file that is cut or a disk that fails then gives an error that can be
    named, where touching the map would kill the process. looked_through: the samples known to be finite.
    """

    def __init__(self, tar: Path, shard: Shard) -> None:
        try:
            data = index_path(tar).read_bytes()
            if shard.digest and xxhash.xxh3_128_hexdigest(data) != shard.digest:
                raise ValueError("the index is not the one in the manifest")
            self.index: ShardIndex = parse_index(data)
            if len(self.index.samples) != shard.samples:
                raise ValueError(f"the index has {len(self.index.samples)} samples, the manifest {shard.samples}")
            self._descriptor = os.open(tar, os.O_RDONLY)
            self._size = os.fstat(self._descriptor).st_size
        except FileNotFoundError as error:
            raise DamagedSample(tar.name, "(all)", f"{Path(error.filename).name} is missing") from error
        except (OSError, ValueError) as error:
            raise DamagedSample(tar.name, "(all)", f"the shard cannot be opened: {error}") from error
        self._verified: set[int] = set()
        self.looked_through: set[int] = set()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def members(self, places: Sequence[Member]) -> list[np.ndarray]:
        """The data of members, uint8 and writable, with one read where they lie side by side."""
        start, end = min(place.start for place in places), max(place.end for place in places)
        if end - start > 2 * sum(place.end - place.start for place in places):
            return [view for place in places for view in self.members([place])]
        if end > self._size:  # asked first: an index may claim places that no memory could hold
            raise ValueError(f"the shard ends before the sample, at byte {self._size} of {self.index.size}")
        buffer = np.empty(end - start, np.uint8)
        count = os.preadv(self._descriptor, [buffer.data], start)
        while 0 < count < len(buffer) and (more := os.preadv(self._descriptor, [buffer[count:].data], start + count)):
            count += more
        if count < len(buffer):
            raise ValueError(f"the shard was cut while it was read, at byte {start + count} of {self.index.size}")
        for place in places:
            if place.start not in self._verified:
                if checksum(buffer[place.start - start : place.end - start].data) != place.checksum:
                    raise ValueError("the bytes differ from their checksum")
                self._verified.add(place.start)
        return [buffer[place.offset - start : place.end - start] for place in places]


def _has_caption(field: str, annotation: Annotation) -> bool:
    style = field.removeprefix("text.")
    return not field.startswith("text.") or style == CAPTION or style in annotation.captions


def _local(path: Path | str) -> Path:
    text = str(path)
    if "://" in text or text.startswith("pipe:") or re.match(r"[a-z]+:/[^/]", text):
        raise ShardError(f"data.root={text}: shard folders are opened by path only, not by URL or command")
    if not Path(text).is_dir():
        raise ShardError(f"data.root={text}: no such folder")
    return Path(text)
