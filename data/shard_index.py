"""The index beside every shard: each sample's key, members, places, checksums and fields, so reading needs no scan."""

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from avlit.errors import UserError
from data.sample import MEMBERS, check_key, unpack_annotation, unpack_arrays
from data.untrusted_json import is_count, parse_object

INDEX_FORMAT = 1
_BLOCK = 512


class ShardError(UserError):
    """A shard set that cannot be used as asked: wrong identity, unreadable manifest, too much damage."""


class Member(NamedTuple):
    """A tar member's place: its header starts at `start`, its data is [offset, offset + size).

    checksum: xxh3_64 of header and data together, so that a flipped header is found as well as a flipped payload.
    """

    start: int
    offset: int
    size: int
    checksum: str

    @property
    def end(self) -> int:
        """First byte after the data."""
        return self.offset + self.size


@dataclass(frozen=True)
class IndexedSample:
    """One sample's key, shape `FxHxW`, members by extension, and field names with their shapes."""

    key: str
    shape: str
    members: dict[str, Member]
    fields: dict[str, list[int]]


@dataclass(frozen=True)
class ShardIndex:
    """A shard's size in bytes and its samples in the order of the tar."""

    size: int
    samples: tuple[IndexedSample, ...]

    def to_json(self) -> bytes:
        """The index file's bytes; the same shard always gives the same bytes."""
        samples = [
            {"key": s.key, "shape": s.shape, "members": {e: list(m) for e, m in s.members.items()}, "fields": s.fields}
            for s in self.samples
        ]
        document = {"format": INDEX_FORMAT, "size": self.size, "samples": samples}
        return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def index_path(tar: Path) -> Path:
    """Where a shard's index lies."""
    return tar.with_name(tar.name + ".index.json")


def parse_index(data: bytes) -> ShardIndex:
    """An index file's bytes -> ShardIndex; ValueError if it is not one."""
    document = parse_object(data)
    if document.get("format") != INDEX_FORMAT:
        raise ValueError(f"not an index of format {INDEX_FORMAT}")
    try:
        samples = tuple(
            IndexedSample(s["key"], s["shape"], {e: Member(*m) for e, m in s["members"].items()}, s["fields"])
            for s in document["samples"]
        )
        index = ShardIndex(document["size"], samples)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the index lacks or mistypes {error}") from error
    if not is_count(index.size):
        raise ValueError("the index lacks or mistypes 'size'")
    for sample in samples:
        check_key(sample.key)
        for place in sample.members.values():
            if not (is_count(place.start) and is_count(place.offset) and is_count(place.size)):
                raise ValueError(f"sample {sample.key}: the index gives no place in the shard: {list(place)}")
            if not place.start <= place.offset <= place.end <= index.size:
                raise ValueError(f"sample {sample.key}: the index gives a place outside the shard: {list(place)}")
    return index


def index_tar(tar: Path, *, name: str | None = None, required: Sequence[str] = ()) -> ShardIndex:
    """Reads a whole shard and checks every sample; a ShardError names shard, member and reason.

    required: what every sample must have (`required_fields`).
    What the index lists is whole: annotations and tensors parse, fields are there, values are finite, and the tar
    ends as a tar must (a cut at a member's end or a damaged header looks like the end to tar readers).
    """
    name = name or tar.name
    members: dict[str, dict[str, Member]] = {}
    contents: dict[str, dict[str, np.ndarray]] = {}
    data = np.fromfile(tar, np.uint8)
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                key, _, extension = info.name.partition(".")
                if extension not in MEMBERS or not info.isreg():
                    raise ShardError(f"{name}: member {info.name!r} is none of KEY.{', KEY.'.join(MEMBERS)}")
                try:
                    check_key(key)
                except ValueError as error:
                    raise ShardError(f"{name}: member {info.name!r}: {error}") from error
                if extension in members.setdefault(key, {}):
                    raise ShardError(f"{name}: member {info.name!r} is there twice")
                span = data[info.offset : info.offset_data + info.size]
                if len(span) < info.offset_data + info.size - info.offset:
                    raise ShardError(f"{name}: ends inside member {info.name!r}; the shard is truncated")
                place = Member(info.offset, info.offset_data, info.size, checksum(span.data))
                members[key][extension] = place
                contents.setdefault(key, {})[extension] = data[place.offset : place.end]
            end = archive.offset
    except ShardError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:  # a header may claim any length
        raise ShardError(f"{name}: not a tar file: {error or type(error).__name__}") from error
    last = data[end : end + _BLOCK]
    if len(last) < _BLOCK or last.any():
        raise ShardError(f"{name}: no end of archive near byte {end}; truncated, or a member's header is damaged")
    return ShardIndex(len(data), tuple(_check(name, key, members[key], contents[key], required) for key in members))


def checksum(data: bytes | memoryview) -> str:
    """xxh3_64 as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


def _check(
    name: str, key: str, members: dict[str, Member], contents: dict[str, np.ndarray], required: Sequence[str]
) -> IndexedSample:
    missing = [extension for extension in MEMBERS if extension not in members]
    if missing:
        raise ShardError(f"{name}, sample {key}: member {key}.{missing[0]} is missing")
    try:
        annotation = unpack_annotation(contents["json"].tobytes())
        arrays = unpack_arrays(contents["safetensors"])
        if lacking := [field for field in required if field not in arrays]:
            raise ValueError(f"field {lacking[0]} is missing")
    except ValueError as error:
        raise ShardError(f"{name}, sample {key}: {error}") from error
    return IndexedSample(key, annotation.shape, members, {n: list(a.shape) for n, a in arrays.items()})
