"""The manifest of a shard set, `shards.json`: what made it, its subsets, and its shards with sizes and digests."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import xxhash

from avlit.durable import write_atomically
from data.shard_index import ShardError
from data.untrusted_json import is_count, parse_object

MANIFEST = "shards.json"
FORMAT = 1
SPLITS = ("train", "heldout")
Identity = dict[str, str | int | float]

_NAME = re.compile(r"[A-Za-z0-9_]+-(train|heldout)-\d{6}")
_SHAPE = re.compile(r"\d{1,6}x\d{1,6}x\d{1,6}|\d{1,9}ms")
_LEAST = _LENGTH, _LISTED = "reference_tokens", "controls"
_SETTINGS = {"peak": "peak (data.peak, 0.0 for null)"}
_FIX = {
    "controls": "; prepare the clips again with this run's recipe and NAME.depth.mp4, NAME.pose.mp4, NAME.mask.png "
    "beside them"
}
_MOST_SAMPLES = 1_000_000  # of a shard: samples are shuffled by the manifest's word, before an index is read


@dataclass(frozen=True)
class Shard:
    """One shard of a set: `name` without folder and extension, samples all of one `shape` (`FxHxW`, or `640ms`).

    size: bytes of the tar. digest: xxh3_128 of the index file. Both are unknown (0 and "") in a set that is
    planned first and written while it is read.
    """

    name: str
    split: str
    subset: str
    samples: int
    shape: str
    size: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Manifest:
    """`shards.json`. growing: the shards are planned and may not be written yet; readers wait for them."""

    identity: Identity
    shards: tuple[Shard, ...]
    growing: bool = False

    @property
    def subsets(self) -> tuple[str, ...]:
        """Subset names in the order of their first shard."""
        return tuple(dict.fromkeys(shard.subset for shard in self.shards))

    def to_json(self) -> bytes:
        """The manifest file's bytes."""
        document = {"format": FORMAT, **asdict(self), "subsets": self.subsets}
        return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"

    def write(self, root: Path) -> None:
        """Writes `root/shards.json`, old or new but never in between."""
        write_atomically(root / MANIFEST, self.to_json())


def read_manifest(root: Path) -> Manifest:
    """`root/shards.json` -> Manifest; ShardError if it is absent, damaged or names paths outside the folder."""
    try:
        document = parse_object((root / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise ShardError(f"data.root={root}: no {MANIFEST} there; `just prepare out=…` makes a shard set") from error
    except ValueError as error:
        raise ShardError(f"{root / MANIFEST}: {error}") from error
    if document.get("format") != FORMAT:
        raise ShardError(f"{root / MANIFEST}: not a shard manifest of format {FORMAT}")
    try:
        shards = tuple(Shard(**entry) for entry in document["shards"])
        manifest = Manifest(dict(document["identity"]), shards, bool(document["growing"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{root / MANIFEST}: lacks or mistypes {error}") from error
    for key in ("fps", "rate_hz"):
        if not isinstance(manifest.identity.get(key), int | float):
            raise ShardError(f"{root / MANIFEST}: the identity lacks {key}, a number")
    for shard in shards:
        if problem := _problem(shard):
            raise ShardError(f"{root / MANIFEST}: {problem}")
    if len({shard.name for shard in shards}) < len(shards):
        raise ShardError(f"{root / MANIFEST}: names a shard twice")
    return manifest


def _problem(shard: Shard) -> str | None:
    if not isinstance(shard.name, str) or not _NAME.fullmatch(shard.name) or shard.split not in SPLITS:
        return f"{shard.name!r} is no SUBSET-SPLIT-000000 shard name"
    if not isinstance(shard.subset, str) or not isinstance(shard.shape, str) or not _SHAPE.fullmatch(shard.shape):
        return f"{shard.name}: of subset {shard.subset!r} and shape {shard.shape!r}, which is no FxHxW or length in ms"
    if not is_count(shard.samples) or shard.samples > _MOST_SAMPLES:
        return f"{shard.name}: of {shard.samples!r} samples; a shard has up to {_MOST_SAMPLES}"
    return None


def check_identity(root: Path, found: Mapping[str, object], needed: Mapping[str, object]) -> None:
    """ShardError naming every key of `needed` that the set at `root` was made without or with another value of.

    Of reference_tokens and controls a set may have more than are needed: a run cuts references to its own length, and
    reads the controls that it needs.
    """
    lines = [
        f"{_name(key)}: the shards have {_said(found, key)}, this run needs {'at least ' * (key in _LEAST)}{value!r}"
        f"{_FIX.get(key, '')}"
        for key, value in sorted(needed.items())
        if not _is_met(key, found.get(key), value)
    ]
    _refuse(root, lines)


def check_same_identity(root: Path, found: Mapping[str, object], other: Mapping[str, object], *, whose: str) -> None:
    """ShardError naming every key of either that the set at `root` and an `other` identity differ in.

    whose: the other, with its verb, in the message ("those in FOLDER have").
    """
    lines = [
        f"{_name(key)}: the shards have {_said(found, key)}, {whose} {_said(other, key)}"
        for key in sorted({**other, **found})
        if key not in found or key not in other or found[key] != other[key]
    ]
    _refuse(root, lines)


def _refuse(root: Path, differences: Sequence[str]) -> None:
    if differences:
        raise ShardError(
            f"data.root={root} was made with other settings:\n  " + "\n  ".join(differences) + "\n"
            "Prepare the clips again with the same settings, or run with the shards' settings"
        )


def _is_met(key: str, has: object, value: object) -> bool:
    if key == _LENGTH and isinstance(has, int) and isinstance(value, int):
        return has >= value
    if key == _LISTED and isinstance(has, str) and isinstance(value, str):
        return set(value.split(",")) <= set(has.split(","))
    return has == value


def _name(key: str) -> str:
    return _SETTINGS.get(key, key)


def _said(identity: Mapping[str, object], key: str) -> str:
    return repr(identity[key]) if key in identity else "nothing"


def seal(shard: Shard, *, size: int, index: bytes) -> Shard:
    """The manifest entry of a written shard: its size and its index's digest filled in."""
    return replace(shard, size=size, digest=xxhash.xxh3_128_hexdigest(index))
