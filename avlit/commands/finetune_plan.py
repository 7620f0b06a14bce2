"""What `just finetune` would do, before anything is prepared or trained: counts, and estimates of memory and time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from avlit.commands import custom_clips
from avlit.commands.estimate import drawn_module
from avlit.config import Config
from avlit.dry_run import StepCost, blank_batch, dry_run
from avlit.estimate import dtypes_on_device, memory_of, micro_batch_of, sharding_on_gpus
from avlit.media import MediaError, probe
from avlit.models.backbones import LayerRun
from avlit.module import AVModule
from data.manifest import read_manifest
from data.prepare.config import PrepareConfig
from data.prepare.tables import ClipRow

if TYPE_CHECKING:
    from avlit.commands.finetune import Finetuning

CPU_SHARE, GPU_SHARE = 0.35, 0.4
"""Of the machine's rate of large matrix products that a training step reaches: chosen after what tiny ones reach."""


@dataclass(frozen=True)
class Windows:
    """What the clips come to. seconds: of all clips; notes: on clips that would give nothing."""

    clips: int
    windows: int
    seconds: float
    notes: tuple[str, ...]


def plan_lines(wanted: Finetuning, rows: list[ClipRow]) -> list[str]:
    """The plan in words. rows: clips of a plain folder, none where `data.root` holds shards already."""
    config, format = wanted.config, wanted.format
    share = custom_clips.DEFAULT_REPLAY if wanted.replay is None else wanted.replay
    root = Path(str(config.data.root))
    if rows:
        how = custom_clips.prepare_config(config, wanted.prepare, source=root, out=root / "-")
        found = count_windows(rows, how)
        lines = [
            f"prepare: {found.clips} clips of {found.seconds:.1f} s to about {found.windows} windows of "
            f"{how.timing.duration_s:.2f} s ({how.heldout:.0%} kept apart), unless they are in the cache"
        ]
        lines += [f"  {note}" for note in found.notes]
        windows = found.windows
    else:
        manifest = read_manifest(root)
        windows = sum(shard.samples for shard in manifest.shards if shard.split == "train")
        lines = [f"data: {windows} windows in shards that are there already"]
    has_gpu = config.train.accelerator != "cpu" and torch.cuda.is_available()
    module, cost = count_step(config, has_gpu=has_gpu)
    total = sum(parameter.numel() for parameter in module.model.parameters())
    trained = sum(parameter.numel() for parameter in module.trained_parameters.values())
    tokens, train = module.tokens_per_sample, config.train
    clips = train.steps * config.data.batch_size
    flops = float(cost.flops + cost.recomputed_flops) * train.steps * train.accumulate  # of each device
    rate, where = matrix_rate(config, has_gpu=has_gpu)
    lines += [
        f"train: {train.steps} steps of {config.data.batch_size} clips, {tokens} tokens a clip, "
        f"{clips * tokens / 1e6:.1f} M tokens; {share:.0%} of them clips of the base, where they can be had, so each "
        f"window about {(1 - share) * clips / max(windows, 1):.0f} times",
        f"adapter={config.adapter.kind}: {trained / 1e6:.2f} M of {total / 1e6:.2f} M weights train",
        f"memory: about {_size(memory_of(module, config, cost, is_gpu=has_gpu).total)} of tensors on each device",
        f"time: about {_duration(flops / rate)} for the steps ({flops / 1e15:.3g} PFLOP on {where}), besides "
        "measuring and sampling",
        f"then: clips of before and after, losses on these clips and on the base's own, export as {format}"
        if format != "none"
        else "then: clips of before and after, losses on these clips and on the base's own; no export",
        "Nothing was prepared or trained: plan=true",
    ]
    return lines


def count_windows(rows: list[ClipRow], how: PrepareConfig) -> Windows:
    """Windows by what the files say of their lengths; `just prepare` leaves some out that are silent, for example."""
    clips, windows, seconds, notes = 0, 0, 0.0, []
    for row in rows:
        try:
            info = probe(row.media)
        except MediaError as error:
            notes.append(f"left out: {error}")
            continue
        length_s = info.duration_s if how.is_sound_alone or info.picture_s is None else info.picture_s
        frames = round(length_s * how.data.fps)
        count = 1 if how.is_sound_alone else (frames - how.data.num_frames) // how.stride_frames + 1
        if count < 1:
            need = how.timing.duration_s
            notes.append(f"left out: {row.name} lasts {length_s:.2f} s, a window needs {need:.2f} s")
            continue
        clips, windows, seconds = clips + 1, windows + count, seconds + length_s
    return Windows(clips, windows, seconds, tuple(notes))


def count_step(config: Config, *, has_gpu: bool) -> tuple[AVModule, StepCost]:
    """The module on the meta device with its adapter, and what a micro-batch costs it, as `just plan` counts it."""
    module, (_, sharding) = drawn_module(config), sharding_on_gpus(config)
    cost = dry_run(
        module,
        blank_batch(config, micro_batch_of(config)),
        is_bf16=config.precision == "bf16",
        run=LayerRun(config.strategy.activation_checkpointing),
        dtypes=dtypes_on_device(module, config, sharding),
        is_gpu=has_gpu,
    )
    return module, cost


def matrix_rate(config: Config, *, has_gpu: bool) -> tuple[float, str]:
    """FLOPs a second that a step may reach here, and on what: a share of what a large matrix product does."""
    place, size = ("cuda", 4096) if has_gpu else ("cpu", 1024)
    dtype = torch.bfloat16 if has_gpu and config.precision == "bf16" else torch.float32
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    matrix = torch.ones(size, size, device=place, dtype=dtype)
    rates = []
    for _ in range(4):
        began = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        rates.append(2.0 * size**3 / (time.perf_counter() - began))
    name = torch.cuda.get_device_name() if has_gpu else f"{torch.get_num_threads()} CPU threads"
    return max(rates) * (GPU_SHARE if has_gpu else CPU_SHARE), name


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count > 1e8 else f"{count / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds > 90 else f"{seconds:.0f} s"
