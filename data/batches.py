"""From the order's references to AVBatch: reads, replaces what is damaged, stacks; the middle of shard -> batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avlit.batch import AVBatch, Tracks
from avlit.errors import UserError
from avlit.mouth_mask import mouth_mask
from avlit.randomness import numpy_generator
from avlit.timing import Timing
from data.order import Order, SampleRef, ShardRange, Source, check_batch_size, clips_of_device
from data.sample import CAPTION, TRACKS, DamagedSample, EncodedSample
from data.shards import ShardError, ShardSet

_MAX_REPLACEMENTS = 256


@dataclass(frozen=True)
class Contents:
    """What of a sample gets into a batch.

    text_tokens: L, the length that text is padded to. captions: styles, of which one that the clip has is drawn for
    each clip and step; one that every clip has where it has none of them. audio_captions: the same for the audio
    branch's own text, without which it has none. reference_tokens: R, the length that the reference sound is padded to
    or cut at, 0 for none; one of the clip's is drawn. seed: of these draws. mouth_factors: by which the video codec
    divides time and space, to mask the mouths; None masks none. controls: those of CONTROLS that are read.
    """

    text_tokens: int
    captions: tuple[str, ...] = (CAPTION,)
    audio_captions: tuple[str, ...] = ()
    video: bool = True
    audio: bool = False
    tracks: bool = True
    reference_tokens: int = 0
    mouth_factors: tuple[int, int] | None = None
    controls: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class ReaderSettings:
    """All that decides what a training step reads; plain and hashable, so that it travels to worker processes.

    roots: shard folders. subsets: (name, weight) pairs. batch_sizes: one number, or (`FxHxW`, number) pairs.
    contents: what of the samples is read. rank, devices, accumulate: how the global batch is divided.
    """

    roots: tuple[str, ...]
    subsets: tuple[tuple[str, float], ...]
    batch_size: int | tuple[tuple[str, int], ...]
    contents: Contents
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
        return Reading(collate(samples, step=step, slots=slots, contents=self.settings.contents), tuple(damaged))

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
                sample = self.shards.read(ref.shard, ref.index)
                return with_mouths(sample, self.settings.contents, shard=self.shards.shards[ref.shard].name)
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


def collate(samples: Sequence[EncodedSample], *, step: int, slots: tuple[int, ...], contents: Contents) -> AVBatch:
    """Samples of one shape -> AVBatch in float32, text padded with zeros to [B, text_tokens, D].

    A clip without a second speaker gets zeros as `speech_second` and has_second False; so does one without a reference,
    or without one of the controls that are read.
    Raises ValueError naming the sample whose text is too long or whose shapes differ from the first sample's.
    """
    styles = _drawn_styles(samples, slots, contents.captions, step=step, contents=contents, draw="caption")
    audio_styles: list[str] = []
    if contents.audio_captions:
        audio_styles = _drawn_styles(
            samples, slots, contents.audio_captions, step=step, contents=contents, draw="audio caption"
        )
    controls: dict[str, Any] = {name: _controls(samples, name) for name in contents.controls}
    for name in contents.controls:
        controls[f"has_{name}"] = tuple(getattr(sample, name) is not None for sample in samples)
    reference = None
    if contents.reference_tokens:
        reference = _references(samples, slots, step=step, contents=contents)
    return AVBatch(
        keys=tuple(sample.key for sample in samples),
        subsets=tuple(sample.annotation.subset for sample in samples),
        captions=tuple(sample.caption_of(style) for sample, style in zip(samples, styles, strict=True)),
        audio_captions=tuple(sample.caption_of(style) for sample, style in zip(samples, audio_styles, strict=False)),
        duration_s=samples[0].annotation.seconds,
        step=step,
        slots=slots,
        text=_texts(samples, styles, contents),
        text_lengths=_lengths(samples, styles),
        audio_text=_texts(samples, audio_styles, contents) if audio_styles else None,
        audio_text_lengths=_lengths(samples, audio_styles),
        video_latents=_field(samples, "video_latents") if contents.video else None,
        audio_latents=_field(samples, "audio_latents") if contents.audio else None,
        tracks=_tracks(samples) if contents.tracks else None,
        reference=reference,
        has_reference=tuple(bool(sample.references) for sample in samples) if contents.reference_tokens else (),
        mouth_mask=_field(samples, "mouth_mask", dtype=torch.bool) if contents.mouth_factors else None,
        has_mouth=tuple(bool(_array(sample, "mouth_mask").any()) for sample in samples)
        if contents.mouth_factors
        else (),
        **controls,
    )


def with_mouths(sample: EncodedSample, contents: Contents, *, shard: str) -> EncodedSample:
    """The sample with its mouth mask, where the contents ask for one.

    DamagedSample: its boxes do not fit its frames. UserError: nobody has looked for mouths in it.
    """
    if contents.mouth_factors is None:
        return sample
    known, (temporal, spatial) = sample.annotation, contents.mouth_factors
    if not known.mouth_boxes:
        raise UserError(
            f"sample {sample.key} of {shard}: its mouths were not looked for, and the mouth loss needs them; prepare "
            "its clips again with mouths=facemesh (`just prepare`), or train with mouth_weight=null"
        )
    try:
        timing = Timing(
            fps=known.fps,
            num_frames=known.num_frames,
            height=known.height,
            width=known.width,
            rate_hz=int(known.rate_hz),
            temporal_factor=temporal,
            spatial_factor=spatial,
        )
        mask = mouth_mask(known.mouth_boxes, timing=timing, sample=sample.key).numpy()
        if mask.shape != (cells := _array(sample, "video_latents").shape[1:]):
            raise ValueError(f"its sizes make {list(mask.shape)} latent cells, it has {list(cells)}")
    except ValueError as error:
        raise DamagedSample(shard, sample.key, str(error).removeprefix(f"sample {sample.key}: ")) from error
    return replace(sample, mouth_mask=mask)


def pinned(reading: Reading) -> Reading:
    """The same reading in page-locked memory."""
    return replace(reading, batch=reading.batch.pinned())


def _drawn_styles(
    samples: Sequence[EncodedSample],
    slots: tuple[int, ...],
    wanted: tuple[str, ...],
    *,
    step: int,
    contents: Contents,
    draw: str,
) -> list[str]:
    """Of each clip one of the wanted styles that it has; draw: the name of the random numbers."""
    drawn = []
    for sample, slot in zip(samples, slots, strict=True):
        styles = [style for style in wanted if style in sample.texts] or [CAPTION]
        which = 0
        if len(styles) > 1:
            which = int(numpy_generator(contents.seed, step, slot, draw).integers(len(styles)))
        drawn.append(styles[which])
    return drawn


def _texts(samples: Sequence[EncodedSample], styles: Sequence[str], contents: Contents) -> Tensor:
    """Each clip's text of its style [B, text_tokens, D], zeros after its end."""
    out = torch.zeros(len(samples), contents.text_tokens, samples[0].texts[styles[0]].shape[1])
    for row, style, sample in zip(out, styles, samples, strict=True):
        tokens, width = sample.texts[style].shape
        if tokens > contents.text_tokens or width != row.shape[1]:
            raise UserError(
                f"sample {sample.key}: its text is [{tokens}, {width}], the batch's "
                f"[{contents.text_tokens}, {row.shape[1]}]; "
                "the shards were made with another text encoder or length than this run's"
            )
        row[:tokens].copy_(torch.from_numpy(sample.texts[style]))
    return out


def _lengths(samples: Sequence[EncodedSample], styles: Sequence[str]) -> tuple[int, ...]:
    return tuple(len(sample.texts[style]) for sample, style in zip(samples, styles, strict=False))


def _references(samples: Sequence[EncodedSample], slots: tuple[int, ...], *, step: int, contents: Contents) -> Tensor:
    """One reference of each clip [B, R, C], zeros after its end; all zeros for a clip without any."""
    width = _array(samples[0], "audio_latents").shape[1]
    out = torch.zeros(len(samples), contents.reference_tokens, width)
    for row, sample, slot in zip(out, samples, slots, strict=True):
        if sample.references:
            drawn = numpy_generator(contents.seed, step, slot, "reference").integers(len(sample.references))
            latents = sample.references[int(drawn)][: contents.reference_tokens]
            if latents.shape[1] != width:
                raise UserError(
                    f"sample {sample.key}: a reference of {latents.shape[1]} channels, its sound has {width}"
                )
            row[: len(latents)].copy_(torch.from_numpy(latents))
    return out


def _controls(samples: Sequence[EncodedSample], name: str) -> Tensor:
    """A control of each clip, [B, C, T, h, w] or of a reference image [B, C, 1, h, w]; zeros for a clip without one."""
    nothing = np.zeros_like(_array(samples[0], "video_latents"))
    if name == "reference_image":
        nothing = nothing[:, :1]
    arrays = [nothing if (array := getattr(sample, name)) is None else array for sample in samples]
    for array, sample in zip(arrays, samples, strict=True):
        if array.shape != nothing.shape:  # checked here, as the first clip's own may be the odd one
            raise UserError(
                f"sample {sample.key}: {name} is {list(array.shape)}, its video latents ask for "
                f"{list(nothing.shape)}; prepare its clips again"
            )
    return _stack(samples, arrays, name)


def _tracks(samples: Sequence[EncodedSample]) -> Tracks:
    tracks = {name: _field(samples, name) for name in TRACKS}
    silence = np.zeros_like(_array(samples[0], "speech"))
    seconds = [silence if sample.speech_second is None else sample.speech_second for sample in samples]
    return Tracks(
        **tracks,
        speech_second=_stack(samples, seconds, "speech_second"),
        has_second=tuple(sample.speech_second is not None for sample in samples),
    )


def _field(samples: Sequence[EncodedSample], name: str, *, dtype: torch.dtype = torch.float32) -> Tensor:
    return _stack(samples, [_array(sample, name) for sample in samples], name, dtype=dtype)


def _array(sample: EncodedSample, name: str) -> np.ndarray:
    array = getattr(sample, name)
    if array is None:
        raise UserError(f"sample {sample.key}: has no {name}; its shards were made without the codec for it")
    return array


def _stack(
    samples: Sequence[EncodedSample], arrays: Sequence[np.ndarray], name: str, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    out = torch.empty(len(arrays), *arrays[0].shape, dtype=dtype)
    for row, array, sample in zip(out, arrays, samples, strict=True):
        if array.shape != row.shape:
            raise UserError(
                f"sample {sample.key}: {name} is {list(array.shape)}, that of {samples[0].key} {list(row.shape)}; "
                "clips of one bucket must be encoded alike"
            )
        row.copy_(torch.from_numpy(array))  # float16 -> float32 on the way from the shard's bytes to the batch
    return out
