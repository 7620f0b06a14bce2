"""How devices share a run: a copy on each (DDP), or one that is spread over them (FSDP2); what a combination refuses.

The models name their `units`; here their parameters are sharded, and gathered around each unit's forward pass. Nothing
else knows: a parameter that is sharded is a DTensor, of which `avlit.ranks` has the whole or this rank's part.
"""

from __future__ import annotations

from dataclasses import dataclass
from shutil import which
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from avlit.eight_bit import has_torchao
from avlit.errors import ConfigError
from avlit.launch import find_launch
from avlit.models.attention import Attention, has_flash_attn
from avlit.models.backbones import LayerRun

if TYPE_CHECKING:
    from avlit.config import Config
    from avlit.module import AVModule

Kind = Literal["one", "ddp", "fsdp2"]


@dataclass(frozen=True)
class Sharding:
    """How a model is spread over the ranks. nodes: how many copies of it there are (`strategy.shard=node`), else 1.

    reshards: the whole weights of a unit are given up between its forward and its backward pass. gathers_bf16: units
    are gathered, and computed with, in bfloat16; what is trained stays float32. offloads: shards live in host memory.
    """

    copies: int = 1
    reshards: bool = True
    gathers_bf16: bool = False
    offloads: bool = False

    def __call__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Shard the model in place, unless there is one rank: that holds all, and would copy it at every step."""
        if mesh.size() > 1 or self.offloads:
            self.shard(model, mesh)

    def shard(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Shard the model's units, then what lies between them; its parameters become DTensors."""
        if self.copies > 1:
            shape = (self.copies, mesh.size() // self.copies)
            mesh = init_device_mesh(mesh.device_type, shape, mesh_dim_names=("copies", "shards"))
        offload = CPUOffloadPolicy() if self.offloads else OffloadPolicy()
        reduced = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        units: Any = model.units
        for unit in units:
            fully_shard(
                unit,
                mesh=mesh,
                reshard_after_forward=self.reshards,
                mp_policy=reduced if self.gathers_bf16 else MixedPrecisionPolicy(cast_forward_inputs=False),
                offload_policy=offload,
            )
            unit.within = MethodType(_within, unit)
            register_fsdp_forward_method(unit, "within")
        fully_shard(
            model,
            mesh=mesh,
            reshard_after_forward=False,
            mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
            offload_policy=offload,
        )


def _within(unit: nn.Module, function: Any, *args: object) -> Any:
    return function(*args)


@dataclass(frozen=True)
class StrategyPlan:
    """What a config's strategy means on this machine: Lightning's part, the sharding (None: none), how layers run."""

    lightning: Strategy | str
    sharding: Sharding | None
    layer_run: LayerRun

    def apply(self, module: AVModule) -> None:
        """Have the module's layers run, and the module shard itself once the ranks know each other, as planned.

        ConfigError: the recipe's model does not say which its layers or units are.
        """
        model: Any = module.model
        if hasattr(model, "layer_run"):
            model.layer_run = self.layer_run
        elif self.layer_run != LayerRun():
            raise ConfigError(
                f"strategy.activation_checkpointing={self.layer_run.recompute} "
                f"compile={'blocks' if self.layer_run.is_compiled else 'none'}: this recipe's model has no layer_run "
                "by which its layers would run so; set both to none"
            )
        if self.sharding is not None and not hasattr(model, "units"):
            raise ConfigError("strategy=fsdp2: this recipe's model does not name its units; use strategy=ddp")
        module.sharding = self.sharding


COMPUTED_LOW = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that autocast computes in bfloat16, whatever the precision of their weights."""


def lower_frozen(module: AVModule) -> None:
    """Keep in bfloat16 the frozen weights that autocast would cast at every use: the numbers are the same.

    Only of those that no checkpoint holds, since others may be trained by a later run. Once all weights are loaded.
    """
    names = module.released - module.trained_parameters.keys()
    for prefix, layer in module.model.named_modules():
        if isinstance(layer, COMPUTED_LOW):
            for name, parameter in layer.named_parameters(recurse=False):
                if f"{prefix}.{name}" in names and parameter.dtype == torch.float32:
                    parameter.data = parameter.data.to(torch.bfloat16)


def plan_strategy(config: Config) -> StrategyPlan:
    """The plan for this machine. ConfigError: a combination that does not work, with the reason."""
    is_gpu = config.train.accelerator != "cpu" and torch.cuda.is_available()
    kind = kind_of(config, is_gpu=is_gpu)
    launch = find_launch()
    if launch is not None and launch.world_size != config.train.devices:
        raise ConfigError(
            f"train.devices={config.train.devices}: {launch.launcher} started {launch.world_size} processes; set "
            f"train.devices={launch.world_size}"
        )
    sharding = sharding_of(config, kind, nodes=launch.nodes if launch else 1)
    attention = attention_of(config, is_gpu=is_gpu)
    refuse(config, kind, attention, is_gpu=is_gpu)
    run = LayerRun(config.strategy.activation_checkpointing, config.compile == "blocks", attention)
    lightning: Strategy | str = {"one": "auto", "ddp": "ddp"}.get(kind, "")
    if kind == "fsdp2":
        backend = ("cpu:gloo,cuda:nccl" if config.strategy.cpu_offload else None) if is_gpu else "gloo"
        lightning = ModelParallelStrategy(
            data_parallel_size=config.train.devices, tensor_parallel_size=1, process_group_backend=backend
        )
    return StrategyPlan(lightning, sharding, run)


def refuse(config: Config, kind: Kind, attention: Attention, *, is_gpu: bool) -> None:
    """ConfigError for what does not go together, and why; docs/strategies.md has it as a table."""
    settings = config.strategy
    if settings.cpu_offload and not is_gpu:
        raise ConfigError("strategy.cpu_offload=true: without a GPU all is in the host's memory already; leave it out")
    if config.optimizer.states == "8bit" and not has_torchao():
        raise ConfigError("optimizer.states=8bit: needs torchao; `pip install torchao`, or leave it at fp32")
    if config.compile == "blocks":
        if settings.activation_checkpointing == "selective":
            raise ConfigError(
                "compile=blocks: not with strategy.activation_checkpointing=selective, whose policy sees no operation "
                "inside a compiled layer; use blocks or none"
            )
        if attention != "sdpa":
            raise ConfigError(f"compile=blocks: not with attention={attention}, on which a compiled layer would break")
        if not is_gpu and not any(which(name) for name in ("g++", "clang++", "c++")):
            raise ConfigError("compile=blocks: needs a C++ compiler on a CPU, and there is no g++ or clang++ here")


def attention_of(config: Config, *, is_gpu: bool) -> Attention:
    """The backend that `attention=` means here. ConfigError: the one that is named cannot be used."""
    suits_flash = is_gpu and config.precision == "bf16"
    if config.attention == "auto":
        return "flash_attn" if suits_flash and has_flash_attn() and config.compile == "none" else "sdpa"
    if config.attention == "flash_attn":
        if not suits_flash:
            raise ConfigError(
                f"attention=flash_attn: its kernels need a GPU and precision=bf16, here is a "
                f"{'GPU' if is_gpu else 'CPU'} and precision={config.precision}; use attention=sdpa"
            )
        if not has_flash_attn():
            raise ConfigError("attention=flash_attn: flash-attn is not installed (`pip install avlit[flash]`)")
        return "flash_attn"
    if config.attention == "flex" and not is_gpu:
        raise ConfigError("attention=flex: has no backward pass on a CPU; use attention=sdpa")
    return config.attention


def kind_of(config: Config, *, is_gpu: bool) -> Kind:
    """What `strategy=auto` means here, and the strategy that is named otherwise."""
    name = config.strategy.name
    if name != "auto":
        return name
    if config.train.devices == 1:
        return "one"
    return "fsdp2" if is_gpu else "ddp"


def sharding_of(config: Config, kind: Kind, *, nodes: int) -> Sharding | None:
    """How a model is sharded; None where it is not. ConfigError: a setting that would have no effect."""
    settings = config.strategy
    if kind != "fsdp2":
        for key, value, default in (("shard", settings.shard, "full"), ("cpu_offload", settings.cpu_offload, False)):
            if value != default:
                raise ConfigError(
                    f"strategy.{key}={str(value).lower()}: has no effect, since strategy=auto shards nothing on "
                    f"{config.train.devices} device(s) here; leave it out, or set strategy=fsdp2"
                )
        return None
    if settings.shard == "node" and nodes == 1:
        raise ConfigError("strategy.shard=node: there is one node, which strategy.shard=full means; leave it out")
    return Sharding(
        copies=nodes if settings.shard == "node" else 1,
        reshards=settings.shard != "grads",
        gathers_bf16=config.precision == "bf16",
        offloads=settings.cpu_offload,
    )
