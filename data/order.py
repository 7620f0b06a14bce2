"""Which clips make up the global batch of a step: pure functions of seed and step, so data state is one integer.

A step's global batch is the same for any number of devices, accumulation or workers, and needs nothing of what came
before it. Shares are kept exactly by counting: after n draws a source with share p has had p * n of them, give or
take a constant, and which draws those were follows from n alone.
"""

import math
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np

from avlit.errors import UserError

_CACHED = 8
_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class ShardRange:
    """A shard as the order sees it: its number in the shard set, its samples, and the bucket (`FxHxW`) they are of."""

    shard: int
    samples: int
    bucket: str


@dataclass(frozen=True)
class Source:
    """A subset that is mixed in by `weight`, with its training shards."""

    name: str
    weight: float
    shards: tuple[ShardRange, ...]


@dataclass(frozen=True)
class SampleRef:
    """One slot of a global batch: sample `index` of shard `shard`, at `position` of its source's endless order."""

    source: str
    bucket: str
    position: int
    shard: int
    index: int
    slot: int


class Mix:
    """Draws from several items by share: `draw(n)` says which item the n-th draw takes and how often it came before.

    A chain of two-way splits, each with floor(n * share + 1/2) draws to its first side: exact in the long run for any
    rational shares, even in the short run, and computed for any n without going through the draws before it.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        self._splits = []
        for place, share in enumerate(shares):
            part = share / sum(shares[place:])
            self._splits.append((part.numerator, part.denominator))

    def draw(self, number: int) -> tuple[int, int]:
        """Draw `number` (from 0) -> (item, how many draws of this item came before)."""
        for item, (part, whole) in enumerate(self._splits):
            before = (2 * number * part + whole) // (2 * whole)
            if (2 * (number + 1) * part + whole) // (2 * whole) > before:
                return item, before
            number -= before
        raise AssertionError("the last share of a chain is the whole of what is left")


class Order:
    """The endless order of training clips.

    Each source goes through its shards of a bucket in passes; in every pass the shards are permuted and the samples
    shuffled within groups of `group_shards` shards, so that few files are read at a time and a pass is never held in
    memory. A batch is of one bucket; buckets take turns in proportion to the clips that their sources' weights give
    them. batch_size: clips of a global batch, one number or one for each bucket.
    in_written_order: the first pass takes the shards one after the other as they are listed, shuffled only within each
    shard, for sets that are still being written.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        batch_size: int | Mapping[str, int],
        seed: int,
        group_shards: int = 4,
        in_written_order: bool = False,
    ) -> None:
        for source in sources:
            if not (source.weight >= 0 and math.isfinite(source.weight)):
                raise UserError(f"data.subsets.{source.name}={source.weight}: a weight is a number of 0 or more")
            if source.weight and not any(shard.samples for shard in source.shards):
                raise UserError(f"data.subsets.{source.name}={source.weight}: no training clips of it in the shards")
        sources = [source for source in sources if source.weight > 0]
        if not sources:
            raise UserError("data.subsets: every weight is 0; give at least one subset a weight above 0")
        buckets = tuple(dict.fromkeys(shard.bucket for source in sources for shard in source.shards))
        self.batch_sizes = _batch_sizes(batch_size, buckets)
        self._seed = seed
        shares: dict[str, list[tuple[Source, Fraction]]] = {bucket: [] for bucket in buckets}
        for source in sources:
            total = sum(shard.samples for shard in source.shards)
            for bucket in dict.fromkeys(shard.bucket for shard in source.shards):
                held = sum(shard.samples for shard in source.shards if shard.bucket == bucket)
                if held:
                    shares[bucket].append((source, Fraction(str(source.weight)) * Fraction(held, total)))
        self._buckets = [bucket for bucket in buckets if shares[bucket]]
        self._bucket_mix = Mix(
            [sum((s for _, s in shares[b]), Fraction()) / self.batch_sizes[b] for b in self._buckets]
        )
        self._source_names = {bucket: [source.name for source, _ in shares[bucket]] for bucket in self._buckets}
        self._source_mix = {bucket: Mix([share for _, share in shares[bucket]]) for bucket in self._buckets}
        self._passes = {
            (source.name, bucket): _Passes(
                [shard for shard in source.shards if shard.bucket == bucket and shard.samples],
                key=(seed, _number(source.name), _number(bucket)),
                group_shards=group_shards,
                in_written_order=in_written_order,
            )
            for bucket in self._buckets
            for source, _ in shares[bucket]
        }

    def bucket(self, step: int) -> str:
        """The shape `FxHxW` of the clips of a step's batch."""
        return self._buckets[self._bucket_mix.draw(step)[0]]

    def batch(self, step: int) -> list[SampleRef]:
        """The global batch of optimizer step `step`, in the order of its slots."""
        place, before = self._bucket_mix.draw(step)
        bucket = self._buckets[place]
        size, names, mix = self.batch_sizes[bucket], self._source_names[bucket], self._source_mix[bucket]
        # slots are shuffled: devices take every n-th slot, and the mix's regular pattern would give some of them
        # always the same subset
        slots = _permutation(size, self._seed, _number("slots"), step)
        refs = []
        for draw, slot in enumerate(slots):
            source, position = mix.draw(before * size + draw)
            refs.append(self._at(names[source], bucket, position, int(slot)))
        return sorted(refs, key=lambda ref: ref.slot)

    def after(self, ref: SampleRef) -> SampleRef:
        """What takes the slot instead if `ref` is damaged: the next position of the same source and shape."""
        return self._at(ref.source, ref.bucket, ref.position + 1, ref.slot)

    def _at(self, source: str, bucket: str, position: int, slot: int) -> SampleRef:
        shard, index = self._passes[source, bucket].locate(position)
        return SampleRef(source, bucket, position, shard, index, slot)


def clips_of_device(
    refs: Sequence[SampleRef], *, micro_step: int, accumulate: int, rank: int, devices: int
) -> list[SampleRef]:
    """The part of a global batch that device `rank` reads in micro-step `micro_step`: strided by device.

    Every slot falls to exactly one device and micro-step; the length must divide, see `check_batch_size`.
    """
    size = len(refs) // (devices * accumulate)
    start = micro_step * size * devices
    return list(refs[start + rank : start + size * devices : devices])


def check_batch_size(batch_sizes: Mapping[str, int], *, devices: int, accumulate: int) -> None:
    """ValueError if a global batch does not divide among the devices and micro-steps, with what would work."""
    parts = devices * accumulate
    for bucket, size in batch_sizes.items():
        if size % parts:
            below, above = size // parts * parts, -(-size // parts) * parts
            near = f"{below} or {above}" if below else f"{above}"
            raise UserError(
                f"data.batch_size={size} (clips of {bucket} in an optimizer step) does not divide among "
                f"train.devices={devices} x train.accumulate={accumulate} = {parts} parts; the nearest sizes are {near}"
            )


class _Passes:
    """The endless order of one source's samples of one bucket, pass after pass."""

    def __init__(
        self, shards: Sequence[ShardRange], *, key: tuple[int, ...], group_shards: int, in_written_order: bool
    ) -> None:
        self._shards, self._key = list(shards), key
        self._group_shards, self._in_written_order = group_shards, in_written_order
        self._total = sum(shard.samples for shard in shards)
        self._plans: OrderedDict[int, tuple[list[list[ShardRange]], list[int]]] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], tuple[np.ndarray, list[int]]] = OrderedDict()

    def locate(self, position: int) -> tuple[int, int]:
        """A position of the endless order -> (shard number, sample index in it)."""
        number, offset = divmod(position, self._total)
        groups, starts = _cached(self._plans, number, lambda: self._plan(number))
        group = bisect_right(starts, offset) - 1
        shuffled, bounds = _cached(self._groups, (number, group), lambda: self._shuffle(number, group, groups[group]))
        sample = int(shuffled[offset - starts[group]])
        place = bisect_right(bounds, sample) - 1
        return groups[group][place].shard, sample - bounds[place]

    def _plan(self, number: int) -> tuple[list[list[ShardRange]], list[int]]:
        """The groups of shards of a pass, and the first offset of each."""
        if number == 0 and self._in_written_order:
            groups = [[shard] for shard in self._shards]
        else:
            shards = [self._shards[place] for place in _permutation(len(self._shards), *self._key, number)]
            groups = [shards[at : at + self._group_shards] for at in range(0, len(shards), self._group_shards)]
        return groups, _starts([sum(shard.samples for shard in group) for group in groups])

    def _shuffle(self, number: int, group: int, shards: Sequence[ShardRange]) -> tuple[np.ndarray, list[int]]:
        """The shuffled samples of a group of shards, counted through, and the first count of each shard."""
        counts = [shard.samples for shard in shards]
        return _permutation(sum(counts), *self._key, number, 1 + group), _starts(counts)


def _batch_sizes(batch_size: int | Mapping[str, int], buckets: Sequence[str]) -> dict[str, int]:
    sizes = dict.fromkeys(buckets, batch_size) if isinstance(batch_size, int) else dict(batch_size)
    for bucket in buckets:
        if bucket not in sizes:
            raise UserError(
                f"data.batch_size: the shards hold clips of {bucket} and no batch size is given for them; "
                f"add data.batch_size.{bucket}, or give one number for all"
            )
        if sizes[bucket] < 1:
            raise UserError(f"data.batch_size={sizes[bucket]}: must be at least 1")
    return {bucket: sizes[bucket] for bucket in buckets}


def _permutation(length: int, *key: int) -> np.ndarray:
    """A permutation of 0..length-1 that depends on `key` alone, the same with every numpy version."""
    # numpy promises the bit stream of PCG64, not what Generator.permutation makes of it
    words = np.random.PCG64(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(words, kind="stable")


def _number(name: str) -> int:
    return zlib.crc32(name.encode())


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(counts[:-1], dtype=np.int64).tolist()]


def _cached(cache: OrderedDict[_Key, _Value], key: _Key, make: Callable[[], _Value]) -> _Value:
    value = cache.get(key)
    if value is None:
        value = cache[key] = make()
        if len(cache) > _CACHED:
            cache.popitem(last=False)
    return value
