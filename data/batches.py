"""From the order's references to AVBatch: reads, replaces what is damaged, stacks; the middle of shard -> batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from avlit.batch import AVBatch
from avlit.errors import UserError
from data.order import Order, SampleRef, ShardRange, Source, check_batch_size, clips_of_device
from data.sample import TRACKS, DamagedSample, EncodedSample
from data.shards import ShardError, ShardSet

_MAX_REPLACEMENTS = 256


@dataclass(frozen=True)
class ReaderSettings:
    """All that decides what a training step reads; plain and hashable, so that it travels to worker processes.

    roots: shard folders. subsets: (name, weight) pairs. batch_sizes: one number, or (`FxHxW`, number) pairs.
    text_tokens: L, the length that text is padded to. rank, devices, accumulate: how the global batch is divided.
    """

    roots: tuple[str, ...]
    subsets: tuple[tuple[str, float], ...]
    batch_size: int | tuple[tuple[str, int], ...]
    text_tokens: int
    seed: int
    group_shards: int = 4
    rank: int = 0
    devices: int = 1
    accumulate: int = 1


@dataclass(frozen=True)
class Reading:
    """A micro-batch and the damaged samples that were replaced in it."""

    batch: AVBatch
    damaged: tuple[DamagedSample, ...] = ()


class BatchReader:
    """Reads micro-batch `number` = step * accumulate + micro_step; a function of its settings and the number alone."""

    def __init__(self, settings: ReaderSettings, shards: ShardSet) -> None:
        self.settings, self.shards = settings, shards
        sizes = settings.batch_size if isinstance(settings.batch_size, int) else dict(settings.batch_size)
        self.order = Order(
            training_sources(shards, settings.subsets),
            batch_size=sizes,
            seed=settings.seed,
            group_shards=settings.group_shards,
            in_written_order=shards.is_growing,
        )
        check_batch_size(self.order.batch_sizes, devices=settings.devices, accumulate=settings.accumulate)

    def __call__(self, number: int) -> Reading:
        """Raises ShardError where damage has no replacement, ValueError for samples of unlike shapes."""
        step, refs = number // self.settings.accumulate, self._refs(number)
        damaged: list[DamagedSample] = []
        samples = [self._read(ref, damaged) for ref in refs]
        slots = tuple(ref.slot for ref in refs)
        return Reading(collate(samples, step=step, slots=slots, text_tokens=self.settings.text_tokens), tuple(damaged))

    def describe(self, number: int) -> str:
        """What micro-batch `number` is read from, for messages; opens no file."""
        step, micro_step = divmod(number, self.settings.accumulate)
        names = dict.fromkeys(f"{self.shards.shards[ref.shard].name}.tar" for ref in self._refs(number))
        return f"micro-batch {micro_step} of step {step} from {', '.join(names)}"

    def _refs(self, number: int) -> list[SampleRef]:
        settings = self.settings
        step, micro_step = divmod(number, settings.accumulate)
        return clips_of_device(
            self.order.batch(step),
            micro_step=micro_step,
            accumulate=settings.accumulate,
            rank=settings.rank,
            devices=settings.devices,
        )

    def _read(self, ref: SampleRef, damaged: list[DamagedSample]) -> EncodedSample:
        for _ in range(_MAX_REPLACEMENTS):
            try:
                return self.shards.read(ref.shard, ref.index)
            except DamagedSample as damage:
                damaged.append(damage)
                ref = self.order.after(ref)
        raise ShardError(f"{_MAX_REPLACEMENTS} samples of {ref.source} in a row are damaged; the last: {damaged[-1]}")


@lru_cache(maxsize=4)
def reader_of(settings: ReaderSettings) -> BatchReader:
    """The reader of these settings in this process, opened once: what worker processes read through."""
    return BatchReader(settings, ShardSet.open(settings.roots))


def training_sources(shards: ShardSet, subsets: Sequence[tuple[str, float]]) -> list[Source]:
    """The subsets with their training shards; ValueError names a subset that the shards do not have."""
    for name, _ in subsets:
        if name not in shards.subsets:
            raise UserError(f"data.subsets.{name}: the shards hold {', '.join(shards.subsets) or 'nothing'}")
    ranges: dict[str, list[ShardRange]] = {name: [] for name, _ in subsets}
    for number, shard in shards.select("train"):
        if shard.subset in ranges:
            ranges[shard.subset].append(ShardRange(number, shard.samples, shard.shape))
    return [Source(name, weight, tuple(ranges[name])) for name, weight in subsets]


def collate(samples: Sequence[EncodedSample], *, step: int, slots: tuple[int, ...], text_tokens: int) -> AVBatch:
    """Samples of one shape -> AVBatch in float32, text padded with zeros to [B, text_tokens, D].

    A clip without a second speaker gets zeros as `speech_second` and has_second False.
    Raises ValueError naming the sample whose text is too long or whose shapes differ from the first sample's.
    """
    text = torch.zeros(len(samples), text_tokens, samples[0].text.shape[1])
    for row, sample in zip(text, samples, strict=True):
        tokens, width = sample.text.shape
        if tokens > text_tokens or width != row.shape[1]:
            raise UserError(
                f"sample {sample.key}: its text is [{tokens}, {width}], the batch's [{text_tokens}, {row.shape[1]}]; "
                "the shards were made with another text encoder or length than this run's"
            )
        row[:tokens].copy_(torch.from_numpy(sample.text))
    tracks = {name: _stack(samples, [getattr(sample, name) for sample in samples], name) for name in TRACKS}
    silence = np.zeros_like(samples[0].speech)
    seconds = [silence if sample.speech_second is None else sample.speech_second for sample in samples]
    return AVBatch(
        keys=tuple(sample.key for sample in samples),
        subsets=tuple(sample.annotation.subset for sample in samples),
        captions=tuple(sample.annotation.caption for sample in samples),
        step=step,
        slots=slots,
        video_latents=_stack(samples, [sample.video_latents for sample in samples], "video_latents"),
        text=text,
        text_lengths=torch.tensor([len(sample.text) for sample in samples]),
        **tracks,
        speech_second=_stack(samples, seconds, "speech_second"),
        has_second=tuple(sample.speech_second is not None for sample in samples),
    )


def pinned(reading: Reading) -> Reading:
    """The same reading in page-locked memory, so that its way to the device does not hold the training loop up."""
    tensors = {name: value.pin_memory() for name, value in vars(reading.batch).items() if isinstance(value, Tensor)}
    return replace(reading, batch=replace(reading.batch, **tensors))


def _stack(samples: Sequence[EncodedSample], arrays: Sequence[np.ndarray], name: str) -> Tensor:
    out = torch.empty(len(arrays), *arrays[0].shape)
    for row, array, sample in zip(out, arrays, samples, strict=True):
        if array.shape != row.shape:
            raise UserError(
                f"sample {sample.key}: {name} is {list(array.shape)}, that of {samples[0].key} {list(row.shape)}; "
                "clips of one bucket must be encoded alike"
            )
        row.copy_(torch.from_numpy(array))  # float16 -> float32 on the way from the shard's bytes to the batch
    return out
