"""What a training step needs of each GPU: bytes at its fullest moment, floating-point operations, seconds.

Built from a module on the meta device and what `avlit.dry_run` counts of it. GB are 10^9 bytes.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from avlit.config import Config
from avlit.dry_run import StepCost
from avlit.eight_bit import moment_bytes
from avlit.errors import UserError
from avlit.module import AVModule
from avlit.strategies import COMPUTED_LOW, Kind, Sharding, kind_of, sharding_of

GPUS_PER_NODE = 8
"""For strategy.shard=node."""

TFLOPS = {"bf16": 989.4, "fp32": 66.9}
"""Precision -> an H100's or H200's 10^12 operations a second, dense (NVIDIA's data sheet)."""

UTILISATION = 0.4
"""Share of that rate that the executed operations reach; published training runs reach 0.2 to 0.5."""

MEMORY_BYTES = 80e9

RESERVED_BYTES = 2e9
"""Of a GPU, for the CUDA context, libraries' workspaces and NCCL's buffers; a round number, not measured."""

FLOAT_BYTES = torch.float32.itemsize


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the fullest moment of a step.

    weights: its shard, or all of them. gradients: in float32, with DDP's copy of them in buckets. optimizer: two
    moments. average: the EMA's. gathered: whole weights of the units under way, and their gradients before these are
    shared out. activations: all else that a micro-batch makes, autocast's copies of weights among it. reserved: what no
    tensor is in. host: of these, what lies in the host's memory instead.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    gathered: float
    activations: float
    reserved: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """Of the GPU."""
        parts = (self.weights, self.gradients, self.optimizer, self.average)
        return sum(parts) + self.gathered + self.activations + self.reserved - self.host


@dataclass(frozen=True)
class Advice:
    """Words that make a run smaller. total_bytes: of the GPU's memory, with them; saved_bytes: less than without."""

    words: tuple[str, ...]
    saved_bytes: float
    total_bytes: float


@dataclass(frozen=True)
class Estimate:
    """What a run would need, before anything of it is made.

    config: as it would run, with devices and accumulation. kind: how devices share it. parameters, trained: numbers.
    tokens: of a clip to the backbone. micro_batch: clips at once on a GPU. memory_bytes: of a GPU. flops: of a step, on
    all GPUs, without what is computed again; recomputed_flops: that. utilisation, tflops: what seconds are reckoned
    with. advice: what would save memory, most first; together: what makes it fit, empty where it does or nothing can.
    """

    config: Config
    kind: Kind
    parameters: int
    trained: int
    tokens: int
    micro_batch: int
    memory: Memory
    memory_bytes: float
    flops: float
    recomputed_flops: float
    utilisation: float
    tflops: float
    advice: tuple[Advice, ...] = ()
    together: Advice | None = None

    @property
    def fits(self) -> bool:
        """Whether a GPU holds it."""
        return self.memory.total <= self.memory_bytes

    @property
    def seconds(self) -> float:
        """Of an optimizer step."""
        rate = self.config.train.devices * self.utilisation * self.tflops * 1e12
        return (self.flops + self.recomputed_flops) / rate

    @property
    def mfu(self) -> float:
        """The utilisation without what is computed again, as model FLOPs utilisation is defined."""
        return self.utilisation * self.flops / (self.flops + self.recomputed_flops)


def settle(config: Config, *, gpus: int, micro_batch: int | None = None) -> Config:
    """The config on so many GPUs: the same batch, micro-batches as they are (or as given), accumulated as need be.

    UserError: the batch cannot be shared out so.
    """
    train, batch = config.train, config.data.batch_size
    if gpus < 1 or batch % gpus:
        fitting = ", ".join(str(count) for count in range(1, batch + 1) if batch % count == 0)
        raise UserError(f"gpus={gpus}: data.batch_size={batch} must be a multiple of it; take one of {fitting}")
    here = batch // gpus
    most = micro_batch or batch // (train.devices * train.accumulate)
    clips = max(count for count in range(1, here + 1) if here % count == 0 and count <= max(1, most))
    return replace(config, train=replace(train, devices=gpus, accumulate=here // clips))


def micro_batch_of(config: Config) -> int:
    """Clips that a GPU has at once."""
    return config.data.batch_size // (config.train.devices * config.train.accumulate)


def sharding_on_gpus(config: Config) -> tuple[Kind, Sharding | None]:
    """How the config's GPUs share the model, wherever this is asked."""
    kind = kind_of(config, is_gpu=True)
    sharding = sharding_of(config, kind, nodes=math.ceil(config.train.devices / GPUS_PER_NODE))
    if sharding is not None and config.train.devices == 1 and not sharding.offloads:
        return kind, None  # one GPU holds all
    return kind, sharding


def dtypes_on_device(
    module: AVModule, config: Config, sharding: Sharding | None
) -> dict[nn.Parameter, torch.dtype]:  # fmt: skip
    """Precision in which the device computes with each of the model's parameters."""
    own = dtypes_at_rest(module, config)
    if sharding is not None and sharding.gathers_bf16:
        own |= dict.fromkeys(_unit_parameters(module), torch.bfloat16)
    return own


def dtypes_at_rest(module: AVModule, config: Config) -> dict[nn.Parameter, torch.dtype]:
    """Precision in which each of the model's parameters is kept.

    What is frozen is taken to be released, and lowered as `avlit.strategies.lower_frozen` does, but where it comes from
    another run's checkpoint without an adapter: that holds it in float32, and so does the run that goes on from it.
    """
    own = {each: torch.float32 if each.requires_grad else module.frozen_dtype for each in module.model.parameters()}
    is_released = config.init is None or config.model.weights or config.adapter.is_on or module.base_names
    if config.precision == "bf16" and is_released:
        for layer in module.model.modules():
            if isinstance(layer, COMPUTED_LOW):
                own |= {each: torch.bfloat16 for each in layer.parameters(recurse=False) if not each.requires_grad}
    return own


def memory_of(module: AVModule, config: Config, cost: StepCost, *, is_gpu: bool = True) -> Memory:
    """What a step of a module on the meta device needs of one of the config's devices.

    is_gpu: False for the plain tensors of a step in one process on a CPU.
    """
    kind, sharding = sharding_on_gpus(config)
    parts = 1 if sharding is None else config.train.devices // sharding.copies
    at_rest = dtypes_at_rest(module, config)
    trained = sum(each.numel() for each in at_rest if each.requires_grad)
    moments = 2 * sum(
        each.numel() * (moment_bytes(each) if config.optimizer.states == "8bit" else FLOAT_BYTES)
        for each in at_rest
        if each.requires_grad
    )
    beside = [each for each in module.parameters() if each not in at_rest]  # a recipe's own, beside its model
    weights = sum(each.numel() * dtype.itemsize for each, dtype in at_rest.items()) / parts
    gradients = FLOAT_BYTES * trained / parts
    activations = cost.activation_bytes(
        gradient_bytes=0 if sharding else FLOAT_BYTES * trained,
        accumulates=config.train.accumulate > 1 or sharding is not None,
    )
    found = Memory(
        weights=weights + sum(each.numel() * each.element_size() for each in (*beside, *module.buffers())),
        gradients=gradients * (2 if kind == "ddp" else 1),
        optimizer=moments / parts,
        average=gradients if config.ema.decay else 0.0,
        gathered=_gathered(module, sharding, at_rest) if sharding else 0.0,
        activations=activations,
        reserved=RESERVED_BYTES if is_gpu else 0.0,
    )
    if sharding is not None and sharding.offloads:
        found = replace(found, host=weights + found.gradients + found.optimizer + found.average)
    return found


def _gathered(module: AVModule, sharding: Sharding, at_rest: dict[nn.Parameter, torch.dtype]) -> float:
    """Bytes of whole weights beside a device's own part of them, at most.

    The next unit is gathered while one runs; gradients of one are shared out, in float32, while the next are computed.
    What lies between the units stays whole for the step.
    """
    inside = _unit_parameters(module)
    between = sum(each.numel() * dtype.itemsize for each, dtype in at_rest.items() if each not in inside)

    def size(unit: nn.Module) -> float:
        dtype = torch.bfloat16 if sharding.gathers_bf16 else torch.float32
        return dtype.itemsize * sum(each.numel() for each in unit.parameters())

    def gradient_size(unit: nn.Module) -> float:
        width = FLOAT_BYTES + (torch.bfloat16.itemsize if sharding.gathers_bf16 else 0)
        return width * sum(each.numel() for each in unit.parameters() if each.requires_grad)

    units = _units(module)
    held = 2 * max(map(size, units)) if sharding.reshards else sum(map(size, units))
    return between + held + max(map(gradient_size, units))


def _units(module: AVModule) -> list[nn.Module]:
    model: Any = module.model
    return list(model.units)


def _unit_parameters(module: AVModule) -> set[nn.Parameter]:
    return {each for unit in _units(module) for each in unit.parameters()}
