"""`just plan`: what a run would need of each GPU, how long a step would take, and what to change where it does not fit.

The recipe's module is built on the meta device and its own step is run there, so no weight is read or made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from avlit.config import Config, load_config
from avlit.errors import UserError
from avlit.settings import as_word, read_words
from avlit.timing import VIDEO_FACTORS

if TYPE_CHECKING:  # a wrong word must not wait for torch
    from avlit.dry_run import StepCost
    from avlit.estimate import Advice, Estimate
    from avlit.module import AVModule

WORDS = ("gpus", "memory", "utilisation", "tflops")
"""The command's own words; all others are the config's."""

SMALLER = 0.7
"""Share of its height and width that a smaller frame keeps: about half of its area."""

PLANNED = "planned"
"""Stands for a folder of released weights, which a plan never reads."""


def main(words: Sequence[str]) -> int:
    """Print the plan of the run that the words describe."""
    print(describe(planned(words)))
    return 0


def planned(words: Sequence[str]) -> Estimate:
    """The plan of the run that the words describe: those of its config, and `WORDS`."""
    given = read_words(words)
    own = {name: given.pop(name) for name in WORDS if name in given}
    gpus = _whole("gpus", own["gpus"]) if "gpus" in own else None
    if gpus is not None and "train.devices" in given:
        raise UserError(f"gpus={gpus} and train.devices={given['train.devices']}: mean the same here; keep one")
    numbers: dict[str, float] = {}
    if "memory" in own:
        numbers["memory_bytes"] = parse_memory(own["memory"])
    for name, most in (("utilisation", 1.0), ("tflops", None)):
        if name in own:
            numbers[name] = _number(name, own[name], most=most)
    if {"adapter", "adapter.kind"} & given.keys() and not {"init", "model.weights"} & given.keys():
        given["model.weights"] = PLANNED
    config = load_config([f"{key}={value}" for key, value in given.items()])
    if gpus is not None and "train.accumulate" in given:
        parts, batch = gpus * config.train.accumulate, config.data.batch_size
        if batch % parts:
            raise UserError(
                f"train.accumulate={config.train.accumulate}: data.batch_size={batch} must be a multiple of gpus * "
                f"train.accumulate = {parts}"
            )
        config, gpus = replace(config, train=replace(config.train, devices=gpus)), None
    return estimate(config, gpus=gpus, **numbers)


def estimate(
    config: Config,
    *,
    gpus: int | None = None,
    memory_bytes: float | None = None,
    utilisation: float | None = None,
    tflops: float | None = None,
) -> Estimate:
    """What a run of the config would need; nothing is read, written or allocated.

    gpus: how many share it, with micro-batches as the config has them; None takes the config's devices. memory_bytes:
    of each. utilisation: share of `tflops`, a GPU's 10^12 operations a second, that executed operations reach; see
    `avlit.estimate` for what is taken otherwise. UserError: the batch cannot be shared out so, or a strategy does not
    work.
    """
    from avlit.estimate import MEMORY_BYTES, TFLOPS, UTILISATION, settle

    if gpus is not None:
        config = settle(config, gpus=gpus)
    drawn = _Drawings(
        memory_bytes=MEMORY_BYTES if memory_bytes is None else memory_bytes,
        utilisation=UTILISATION if utilisation is None else utilisation,
        tflops=TFLOPS[config.precision] if tflops is None else tflops,
    )
    found = drawn.estimate(config)
    if found.fits:
        return found
    changes = [(family, words, changed) for family, words, changed in smaller_configs(config)]
    advice = [
        (family, words, drawn.advice(found, words, changed)) for family, words, changed in changes
    ]  # fmt: skip
    advice = sorted((each for each in advice if each[2].saved_bytes > 0), key=lambda each: -each[2].saved_bytes)
    return replace(found, advice=tuple(each for _, _, each in advice), together=drawn.together(found, advice))


class _Drawings:
    """Modules on the meta device and what was counted of each, once."""

    def __init__(self, *, memory_bytes: float, utilisation: float, tflops: float) -> None:
        self.memory_bytes, self.utilisation, self.tflops = memory_bytes, utilisation, tflops
        self.counted: dict[object, tuple[AVModule, StepCost]] = {}

    def estimate(self, config: Config) -> Estimate:
        """Of one config, without advice."""
        from avlit.estimate import Estimate, memory_of, micro_batch_of, sharding_on_gpus

        module, cost = self._counted(config)
        trained = sum(each.numel() for each in module.trained_parameters.values())
        micro_batches = config.train.devices * config.train.accumulate
        return Estimate(
            config=config,
            kind=sharding_on_gpus(config)[0],
            parameters=sum(each.numel() for each in module.parameters()),
            trained=trained,
            tokens=module.tokens_per_sample,
            micro_batch=micro_batch_of(config),
            memory=memory_of(module, config, cost),
            memory_bytes=self.memory_bytes,
            flops=float(cost.flops * micro_batches),
            recomputed_flops=float(cost.recomputed_flops * micro_batches),
            utilisation=self.utilisation,
            tflops=self.tflops,
        )

    def advice(self, before: Estimate, words: tuple[str, ...], changed: Config) -> Advice:
        """What the words save."""
        from avlit.estimate import Advice

        total = self.estimate(changed).memory.total
        return Advice(words, before.memory.total - total, total)

    def together(
        self, before: Estimate, advice: Sequence[tuple[str, tuple[str, ...], Advice]]
    ) -> Advice | None:  # fmt: skip
        """One change after the other, the one that saves most first, until it fits; None where it never does."""
        from avlit.estimate import Advice

        config, words, families = before.config, (), set[str]()
        for family, own, _ in advice:
            if family in families:
                continue
            again = {other: changed for _, other, changed in smaller_configs(config)}
            if own not in again:  # what was changed before it leaves it nothing to do
                continue
            families.add(family)
            config, words = again[own], (*words, *own)
            total = self.estimate(config).memory.total
            if total <= self.memory_bytes:
                return Advice(words, before.memory.total - total, total)
        return None

    def _counted(self, config: Config) -> tuple[AVModule, StepCost]:
        from avlit.dry_run import blank_batch, dry_run
        from avlit.estimate import dtypes_on_device, micro_batch_of, sharding_on_gpus
        from avlit.models.backbones import LayerRun

        data, recompute, clips = config.data, config.strategy.activation_checkpointing, micro_batch_of(config)
        _, sharding = sharding_on_gpus(config)
        gathers_bf16 = sharding is not None and sharding.gathers_bf16
        sizes = (data.num_frames, data.height, data.width, clips)
        key = (config.precision, str(config.adapter), recompute, gathers_bf16, *sizes)
        if key not in self.counted:
            module = drawn_module(config)  # afresh: one that has run keeps its rotary tables, which count
            cost = dry_run(
                module,
                blank_batch(config, clips),
                is_bf16=config.precision == "bf16",
                run=LayerRun(recompute),
                dtypes=dtypes_on_device(module, config, sharding),
            )
            self.counted[key] = module, cost
        return self.counted[key]


def drawn_module(config: Config) -> AVModule:
    """The recipe's module on the meta device as its training would have it: weights loaded, copied, adapted, frozen."""
    import torch

    from avlit.adapters import inject, is_adapter_name, target_layers
    from avlit.commands.assembly import build_module

    if config.model.weights is None:
        config = replace(config, model=replace(config.model, weights=PLANNED))
    with torch.device("meta"):
        module = build_module(config)
        module.copy_weights(frozenset(module.model.state_dict()), frozenset())
        if not config.adapter.is_on:
            module.freeze()
            return module
        if config.adapter.kind == "own":
            trained = [name for name, _ in module.model.named_parameters() if name.startswith(config.own_modules)]
        else:
            layers = target_layers(module.model, config.adapter, parts=config.adapter_parts)
            inject(module.model, [name for names in layers.values() for name in names], config.adapter, seed=0)
            trained = [name for name, _ in module.model.named_parameters() if is_adapter_name(name)]
    wanted = set(trained)
    for name, parameter in module.model.named_parameters():
        parameter.requires_grad_(name in wanted)
    return module


def smaller_configs(config: Config) -> Iterator[tuple[str, tuple[str, ...], Config]]:
    """What could be changed to need less memory: what it is a change of, its words, and the config with them."""
    from avlit.estimate import micro_batch_of, settle, sharding_on_gpus

    kind, sharding = sharding_on_gpus(config)
    train, strategy = config.train, config.strategy

    def change(family: str, values: Mapping[str, Any]) -> tuple[str, tuple[str, ...], Config]:
        return family, tuple(f"{key}={as_word(value)}" for key, value in values.items()), changed(config, values)

    if sharding is None and train.devices > 1:
        yield change("sharding", {"strategy": "fsdp2"})
    elif sharding is not None and strategy.shard != "full":
        yield change("sharding", {"strategy.shard": "full"})
    if sharding is not None and not sharding.offloads:
        yield change("offload", {"strategy.cpu_offload": True})
    if strategy.activation_checkpointing == "none":
        yield change("checkpointing", {"strategy.activation_checkpointing": "selective"})
    if strategy.activation_checkpointing != "blocks":
        yield change("checkpointing", {"strategy.activation_checkpointing": "blocks"})
    if micro_batch_of(config) > 1:
        yield change("micro-batch", {"train.accumulate": train.accumulate * micro_batch_of(config)})
    if config.precision == "fp32":
        yield change("precision", {"precision": "bf16"})
    if config.optimizer.states == "fp32":
        yield change("moments", {"optimizer.states": "8bit"})
    if config.ema.decay:
        yield change("average", {"ema.decay": 0.0, "ema.every": 1} if config.ema.every != 1 else {"ema.decay": 0.0})
    if smaller := smaller_clip(config):
        yield change("frames", smaller)
    if not config.adapter.is_on:
        yield change("adapter", {"adapter": "lora"})
    if kind == "fsdp2" and config.data.batch_size % (2 * train.devices) == 0:
        more = settle(config, gpus=2 * train.devices, micro_batch=micro_batch_of(config))
        yield "gpus", (f"gpus={2 * train.devices}",), more


def smaller_clip(config: Config) -> dict[str, int]:
    """Words for frames of about half the area that the codec and the model can take; for half the sound without any."""
    data, codec = config.data, config.codecs.video
    temporal, spatial = VIDEO_FACTORS[codec]
    if codec == "none":
        frames = 1 + max(1, (data.num_frames - 1) // (2 * temporal)) * temporal
        return {} if frames >= data.num_frames else {"data.num_frames": frames}
    cell = spatial * getattr(config.model, "patch_size", 1)
    found = {
        f"data.{name}": max(cell, round(SMALLER * pixels / cell) * cell)
        for name, pixels in (("height", data.height), ("width", data.width))
    }
    return {} if found == {"data.height": data.height, "data.width": data.width} else found


def changed(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with `a.b -> value`, as those words would make it."""
    for key, value in values.items():
        section, _, name = {"strategy": "strategy.name", "adapter": "adapter.kind"}.get(key, key).rpartition(".")
        if section:
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
        else:
            config = replace(config, **{name: value})
    return config


def describe(found: Estimate) -> str:
    """The plan as it is printed."""
    config, memory, train = found.config, found.memory, found.config.train
    strategy = config.strategy
    shared = {"one": "a GPU alone", "ddp": "strategy=ddp", "fsdp2": f"strategy=fsdp2 strategy.shard={strategy.shard}"}
    video = f"{config.data.num_frames} frames of {config.data.height}x{config.data.width}, "
    parts = (
        ("weights", memory.weights),
        ("gradients" + (", with DDP's copy" if found.kind == "ddp" else ""), memory.gradients),
        (f"optimizer, two moments in {config.optimizer.states}", memory.optimizer),
        ("moving average (ema)", memory.average),
        ("of these, in the host's memory", -memory.host),
        ("whole units, as they are gathered", memory.gathered),
        ("activations", memory.activations),
        ("CUDA and NCCL, taken as", memory.reserved),
    )
    lines = [
        f"{config.recipe}, size {config.size}, on {train.devices} GPU{'s' * (train.devices > 1)}: "
        f"{shared[found.kind]}, precision={config.precision}, "
        f"strategy.activation_checkpointing={strategy.activation_checkpointing}"
        + (f", adapter={config.adapter.kind}" if config.adapter.is_on else ""),
        f"  parameters   {found.parameters / 1e9:.3f} B, {found.trained / 1e9:.3f} B trained",
        f"  a clip       {'' if config.codecs.video == 'none' else video}{config.timing.duration_s:.2f} s: "
        f"{found.tokens:,} tokens",
        f"  a step       {config.data.batch_size} clips: {train.devices} x {train.accumulate} micro-batches of "
        f"{found.micro_batch}",
        "  memory of each GPU",
        *(f"    {name:<38}{size / 1e9:>9.2f} GB" for name, size in parts if size),
        f"    {'together':<38}{memory.total / 1e9:>9.2f} GB of {found.memory_bytes / 1e9:g}: "
        + ("fits" if found.fits else f"{(memory.total - found.memory_bytes) / 1e9:.2f} GB too much"),
        f"  work         {found.flops / 1e12:,.1f} TFLOP a step"
        + (f", and {found.recomputed_flops / 1e12:,.1f} computed again" if found.recomputed_flops else ""),
        f"  time         {found.seconds:,.3g} s a step, {found.seconds * train.steps / 3600:,.1f} h for "
        f"train.steps={train.steps}, if utilisation={found.utilisation:g} of tflops={found.tflops:g} is reached "
        f"(MFU {found.mfu:.2f})",
    ]
    if found.advice:
        lines.append("  what would save memory, each alone")
        lines += [_saving(each) for each in found.advice]
    if not found.fits:
        lines.append("  what makes it fit" if found.together else "  all of these together do not make it fit")
        lines += [_saving(found.together)] if found.together else []
    if config.compile == "blocks":
        lines.append("  compile=blocks is not looked into: compiled layers need less than this")
    return "\n".join(lines)


def _saving(advice: Advice) -> str:
    words = " ".join(advice.words)
    return f"    {words:<52} saves {advice.saved_bytes / 1e9:>7.2f} GB: {advice.total_bytes / 1e9:.2f}"


def parse_memory(text: str) -> float:
    """Bytes of `80GB`, `141GiB`, or GB where no unit is given. UserError: it is no such size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G|MB|MiB|)", text, flags=re.IGNORECASE)
    if match is None or not float(match[1]):
        raise UserError(f"memory={text}: must be a size such as 80GB, 141GiB or 80")
    return float(match[1]) * {"gib": 2**30, "mib": 2**20, "mb": 1e6}.get(match[2].lower(), 1e9)


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,6}", text):
        raise UserError(f"{name}={text}: must be a whole number of at least 1")
    return int(text)


def _number(name: str, text: str, *, most: float | None) -> float:
    bound = "" if most is None else f" and at most {most:g}"
    if not re.fullmatch(r"\d+(\.\d+)?", text) or not 0 < float(text) <= (most or float("inf")):
        raise UserError(f"{name}={text}: must be a number above 0{bound}")
    return float(text)
