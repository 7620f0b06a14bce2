"""What `just finetune` would do, before anything is prepared or trained: counts, and estimates of memory and time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from avlit.adapters import target_layers
from avlit.commands import custom_clips
from avlit.commands.assembly import build_module
from avlit.config import Config
from avlit.media import MediaError, probe
from data.manifest import read_manifest
from data.prepare.config import PrepareConfig
from data.prepare.tables import ClipRow

if TYPE_CHECKING:
    from avlit.commands.finetune import Finetuning

NUMBERS_PER_TOKEN = 40
"""Numbers that a block keeps of each token and each of the model's widths for the backward pass: inputs of its norms,
projections and feed-forward, queries, keys and values; of one stream, without recomputation (measured at `tiny`)."""

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
    with torch.device("meta"):
        module = build_module(config)
    total = sum(parameter.numel() for parameter in module.model.parameters())
    trained = trained_numbers(module.model, config)
    tokens, train = module.tokens_per_sample, config.train
    clips = train.steps * config.data.batch_size
    lines += [
        f"train: {train.steps} steps of {config.data.batch_size} clips, {tokens} tokens a clip, "
        f"{clips * tokens / 1e6:.1f} M tokens; {share:.0%} of them clips of the base, where they can be had, so each "
        f"window about {(1 - share) * clips / max(windows, 1):.0f} times",
        f"adapter={config.adapter.kind}: {trained / 1e6:.2f} M of {total / 1e6:.2f} M weights train",
        f"memory: about {_size(training_bytes(config, module.model, total=total, trained=trained, tokens=tokens))}",
    ]
    rate, where = matrix_rate(config)
    per_clip = clip_flops(total, trained, tokens, recomputes=recomputes(config))
    seconds = clips * per_clip / train.devices / rate
    lines += [
        f"time: about {_duration(seconds)} for the steps ({clips * per_clip / 1e15:.3g} PFLOP on {where}), besides "
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


def trained_numbers(model: nn.Module, config: Config) -> int:
    """Weights that the adapter has."""
    if config.adapter.kind == "own":
        return sum(p.numel() for name, p in model.named_parameters() if name.startswith(config.own_modules))
    layers = target_layers(model, config.adapter, parts=config.adapter_parts)
    found = 0
    for name in (name for names in layers.values() for name in names):
        layer: nn.Module = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        found += config.adapter.rank * (layer.in_features + layer.out_features)
        found += layer.out_features if config.adapter.kind == "dora" else 0
    return found


def training_bytes(config: Config, model: nn.Module, *, total: int, trained: int, tokens: int) -> float:
    """Weights, gradients, moments and average of what trains, and activations, on one device."""
    is_bf16 = config.precision == "bf16"
    weights = 4.0 * total + trained * (4 + 8 + (4 if config.ema.decay else 0))
    widths = [layer.in_features for layer in model.modules() if isinstance(layer, nn.Linear)]
    width, layers = max(set(widths), key=widths.count), _num_blocks(model)
    micro_batch = config.data.batch_size / config.train.accumulate / config.train.devices
    kept = 2 if recomputes(config) else NUMBERS_PER_TOKEN
    activations = micro_batch * tokens * width * kept * layers * (2 if is_bf16 else 4)
    return weights + activations


def clip_flops(total: int, trained: int, tokens: int, *, recomputes: bool) -> float:
    """Floating-point operations of one clip's step: two a weight and token forward and back, two more for gradients
    of the weights that train, and two where activations are recomputed. Attention's own products are not counted."""
    return tokens * (2.0 * total * (3 if recomputes else 2) + 2.0 * trained)


def recomputes(config: Config) -> bool:
    """Whether activations are computed again in the backward pass."""
    return config.strategy.activation_checkpointing != "none"


def matrix_rate(config: Config) -> tuple[float, str]:
    """FLOPs a second that a step may reach here, and on what: a share of what a large matrix product does."""
    has_gpu = config.train.accelerator != "cpu" and torch.cuda.is_available()
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


def _num_blocks(model: nn.Module) -> int:
    """Transformer blocks: members of the module lists and dictionaries that hold linear layers."""
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    return sum(
        1 for each in lists for block in each if sum(isinstance(part, nn.Linear) for part in block.modules()) >= 4
    )


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count > 1e8 else f"{count / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds > 90 else f"{seconds:.0f} s"
