"""Puts a run's parts together from its config: shards, codecs, data module, recipe; training and sampling share it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avlit.config import CodecConfig, Config, ConfigError, Reads, recipe_module

if TYPE_CHECKING:  # printing a config or starting the corpus writer must not wait for torch
    from avlit.commands.generation import Refiner
    from avlit.module import AVModule
    from data.batches import Contents
    from data.datamodule import AVDataModule
    from data.encode import Encoders


def shard_roots(config: Config) -> list[Path]:
    """The folders that training reads: `data.root`, or the embedded corpus, whose writer is started if need be."""
    if config.data.root is not None:
        return [Path(part) for part in config.data.root.split(",")]
    for name in ("video", "audio", "tracks", "text"):
        if (codec := getattr(config.codecs, name)) not in ("none", "embedded"):
            raise ConfigError(
                f"codecs.{name}={codec}: the embedded corpus is there in the embedded codecs alone; give data.root=, a "
                "folder that `just prepare` has made with this one"
            )
    from data.clip import SUBSETS
    from data.corpus import CorpusSettings
    from data.embedded import ensure_embedded

    data = config.data
    settings = CorpusSettings(
        fps=data.fps, num_frames=data.num_frames, height=data.height, width=data.width, rate_hz=data.rate_hz
    )
    root = ensure_embedded(
        Path(data.cache_dir),
        settings=settings,
        subsets=tuple(data.subsets) or SUBSETS,
        num_clips=data.num_clips,
        has_frames=config.codecs.video != "none",
        controls=config.reads.controls,
    )
    return [root]


def build_encoders(config: Config) -> Encoders:
    """The codecs that the config names; shards made by others are refused."""
    import torch

    device = "cuda" if config.train.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    peak = config.data.peak if config.data.root is not None else None
    return encoders_of(config.codecs, config.reads, peak=peak, device=device)


def encoders_of(codecs: CodecConfig, reads: Reads, *, peak: float | None, device: str) -> Encoders:
    """The codecs of a section of a config, on `device`, and what else a recipe reads; peak: see `Encoders`."""
    from avlit.codecs.build import build_audio_codec, build_text_encoder, build_track_encoder, build_video_codec
    from data.encode import Encoders

    return Encoders(
        text=build_text_encoder(codecs.text, codecs.text_weights, device=device),
        video=None if codecs.video == "none" else build_video_codec(codecs.video, codecs.video_weights, device=device),
        audio=None if codecs.audio == "none" else build_audio_codec(codecs.audio, codecs.audio_weights, device=device),
        tracks=None
        if codecs.tracks == "none"
        else build_track_encoder(codecs.tracks, codecs.tracks_weights, device=device),
        captions=tuple(style for style in (*reads.captions, *reads.audio_captions) if style != "caption"),
        controls=reads.controls,
        reference_tokens=reads.reference_tokens,
        peak=peak,
    )


def batch_contents(config: Config, encoders: Encoders) -> Contents:
    """What of a sample gets into the batches of a run."""
    from data.batches import Contents

    reads, video = config.reads, encoders.video
    return Contents(
        text_tokens=encoders.text.max_tokens,
        captions=reads.captions,
        audio_captions=reads.audio_captions,
        video=encoders.video is not None,
        audio=encoders.audio is not None,
        tracks=encoders.tracks is not None,
        reference_tokens=reads.reference_tokens,
        mouth_factors=(video.temporal_factor, video.spatial_factor) if reads.mouths and video is not None else None,
        controls=reads.controls,
        seed=config.seed,
    )


def build_datamodule(
    config: Config,
    roots: list[Path],
    encoders: Encoders,
    *,
    start_step: int = 0,
    counted: Sequence[Mapping[str, Any]] = (),
) -> AVDataModule:
    """The data module over `roots`, which must have been made with `encoders`.

    start_step, counted: where a resumed run goes on, the step and what the data module's `state()` was in each process.
    """
    from data.datamodule import AVDataModule
    from data.shards import ShardSet

    data = config.data
    batch_size: int | dict[str, int] = data.batch_size
    if data.buckets:  # shapes that are not named take the common size
        shapes = {shard.shape for shard in ShardSet.open(roots).shards}
        if unknown := data.buckets.keys() - shapes:
            raise ConfigError(f"data.buckets.{min(unknown)}: the shards hold clips of {', '.join(sorted(shapes))}")
        batch_size = {shape: data.buckets.get(shape, data.batch_size) for shape in shapes}
    return AVDataModule(
        roots,
        batch_size=batch_size,
        contents=batch_contents(config, encoders),
        seed=config.seed,
        subsets=data.subsets or None,
        expect=encoders.identity(fps=data.fps, rate_hz=data.rate_hz),
        steps=config.train.steps,
        start_step=start_step,
        accumulate=config.train.accumulate,
        devices=config.train.devices,
        workers=data.workers,
        prefetch=data.prefetch,
        max_bad=data.max_bad,
        timeout_s=data.timeout_s,
        max_restarts=data.max_restarts,
        counted=counted,
    )


def build_module(config: Config, *, start_step: int = 0) -> AVModule:
    """The recipe's module with freshly initialised weights, the same for the same seed."""
    recipe = importlib.import_module(recipe_module(config.recipe))
    return recipe.build(config, start_step=start_step)


def build_refiner(config: Config, module: AVModule, encoders: Encoders) -> Refiner:
    """The second stage of the recipe's sampler, for a module that is ready to sample."""
    recipe = importlib.import_module(recipe_module(config.recipe))
    return recipe.build_refiner(module, encoders)
