"""`just prepare`: raw clips and captions to checked, encoded shards, and a report of what was kept and what was not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from avlit.config import DataConfig, load_config
from avlit.errors import ConfigError
from avlit.settings import leaves
from data.prepare.config import PrepareConfig, load_prepare_config

if TYPE_CHECKING:  # a wrong word must not wait for torch
    from data.encode import Encoders
    from data.prepare.preparation import Preparation
    from data.prepare.report import Report


def main(words: Sequence[str]) -> int:
    """`source=FOLDER out=FOLDER` and any key of PrepareConfig; status 1 if not one window was kept."""
    config = load_prepare_config(words)

    from data.prepare.controls import build_annotators
    from data.prepare.mouths import build_mouth_finder
    from data.prepare.preparation import NothingKeptError, Preparation, prepare
    from data.prepare.separation import build_separator

    separator = None if config.codecs.tracks == "none" else build_separator(config.separator)
    found = Path(DataConfig.cache_dir) / "mouths"
    mouths = None if config.is_sound_alone else build_mouth_finder(config.mouths, cache=found)
    annotators = build_annotators(config.annotators)
    how = Preparation(
        timing=config.timing,
        stride_frames=config.stride_frames,
        heldout=config.heldout,
        default_subset=config.subset,
        shard_samples=config.shard_samples,
        include=config.include,
        pattern=config.name_pattern,
        length_step_s=config.length_step_s if config.is_sound_alone else None,
        own_reference=config.reads.own_reference and not config.is_sound_alone,
        free_prompts=config.free_prompts,
    )
    if config.measure_latents:
        print(f"{measure_latents(config, how)}: mean and std of each latent channel, measured over {config.source}")
    encoders = encoders_of(config)
    if note := unmeasured(config):
        print(note)
    try:
        report = prepare(
            Path(config.source),
            Path(config.out),
            captions=None if config.captions is None else Path(config.captions),
            how=how,
            encoders=encoders,
            separator=separator,
            mouths=mouths,
            annotators=annotators,
            settings=asdict(config),
        )
    except NothingKeptError as error:
        print("\n".join(error.report.lines()))
        print(f"just prepare: {error}; nothing was written", file=sys.stderr)
        return 1
    print("\n".join(report.lines()))
    print(f"{config.out}: {readiness(config, report)}")
    return 0


def measure_latents(config: PrepareConfig, how: Preparation) -> Path:
    """Writes the latent statistics of the sources' sound beside the audio codec's weights; UserError if they exist."""
    from avlit.codecs.build import build_audio_codec
    from avlit.codecs.mmaudio import write_latent_stats
    from data.prepare.measurement import sounds_to_measure

    codec = build_audio_codec(config.codecs.audio, config.codecs.audio_weights)
    sounds = sounds_to_measure(
        Path(config.source),
        captions=None if config.captions is None else Path(config.captions),
        how=how,
        peak=config.data.peak,
        codec_hz=codec.rate_hz,
    )
    return write_latent_stats(Path(str(config.codecs.audio_weights)), sounds, device=_device())


def unmeasured(config: PrepareConfig) -> str:
    """What to say where latents will not be normalised by channel though they could be, or nothing."""
    from avlit.codecs.mmaudio import LATENT_STATS

    if config.codecs.audio != "mmaudio" or (path := Path(str(config.codecs.audio_weights)) / LATENT_STATS).exists():
        return ""
    return (
        f"{path}: not there, so latents are only multiplied by the codec's own factor; measure_latents=true measures "
        "each channel's mean and std over the sources first"
    )


def readiness(config: PrepareConfig, report: Report) -> str:
    """The words that train on the shards, or why none do."""
    words = [f"recipe={config.recipe}", f"size={config.size}"]
    recipe = load_config(words)
    keys = leaves(type(recipe))
    left_out = [f"tasks.{name}=0" for name in report.no_controls if f"tasks.{name}" in keys]
    needed = load_config([*words, *left_out]).reads.controls
    if lacking := [name for name in report.no_controls if name in needed]:
        return f"written, but recipe={config.recipe} does not train without {' and '.join(lacking)}, which no clip has"
    words.append(f"data.root={config.out}")
    if recipe.data.subsets.keys() - {name for name, count in report.counts().items() if count["train"]}:
        words.append("data.subsets={}")  # the recipe's mix is of subsets that are not there
    return f"ready for `just train {' '.join([*words, *left_out])}`"


def encoders_of(config: PrepareConfig) -> Encoders:
    """The codecs that the config names, on the GPU where there is one."""
    from avlit.commands import assembly

    try:
        return assembly.encoders_of(config.codecs, config.reads, peak=config.data.peak, device=_device())
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
