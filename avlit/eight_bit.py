"""AdamW whose moments are kept in 8 bits, block by block (arXiv 2110.02861), from torchao, an optional library."""

import math
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from avlit.commit import CheckpointError
from avlit.config import OptimizerConfig
from avlit.errors import ConfigError
from avlit.ranks import as_part, like_sharded, local

PARTS = ("codes", "scale")
"""What of an 8-bit moment is saved: a byte for each value, a scale for each block of 256; the rest is constant."""
BLOCK = 256
SMALLEST = 4096  # values, as in bitsandbytes


def has_torchao() -> bool:
    """Whether torchao can be imported."""
    return find_spec("torchao") is not None


def build_adamw_8bit(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with 8-bit moments for tensors of 4096 values and more whose rows blocks divide; float32 for the others.

    torchao asks whether blocks divide this rank's part, which would make other moments on other numbers of ranks; rows
    are never divided, so blocks within them are the same on any.
    It reads `found_inf` as torch's fused AdamW does, but on the host: every step waits for the device once.
    ConfigError: torchao is not installed.
    """
    if not has_torchao():
        raise ConfigError("optimizer.states=8bit: needs torchao; `pip install torchao`, or set optimizer.states=fp32")
    from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    class LeavingOut(AdamW8bit):
        found_inf: Tensor | None = None

        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            if not is_lowered(p):
                return torch.zeros_like(p)
            return as_part(self._subclass_zeros(local(p), signed, BLOCK), p)

        def step(self, closure: Any = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()  # differentiates and clips, which sets found_inf
            if self.found_inf is None or not bool(self.found_inf):
                super().step()
            return loss

    return LeavingOut(
        parameters,
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def is_lowered(parameter: Tensor) -> bool:
    """Whether the moments of a parameter, which may be on the meta device or sharded, are kept in 8 bits."""
    return parameter.ndim > 1 and parameter.numel() >= SMALLEST and math.prod(parameter.shape[1:]) % BLOCK == 0


def moment_bytes(parameter: Tensor) -> float:
    """Of one of the two moments, for each value."""
    return 1 + torch.float32.itemsize / BLOCK if is_lowered(parameter) else torch.float32.itemsize


def is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it keeps 8-bit moments."""
    return hasattr(optimizer, "block_size")


def parts_of(state: Tensor) -> dict[str, Tensor]:
    """What is saved of an optimizer's state: ending of its name -> tensor; one without an ending if it is plain.

    codes [out, …], scale [out, blocks of a row]: spread over the ranks as the state is.
    """
    held: Any = local(state)
    if not all(hasattr(held, part) for part in PARTS):
        return {"": state}
    scales = held.scale.view(len(held.codes), math.prod(held.codes.shape[1:]) // BLOCK)
    return {".codes": as_part(held.codes, state), ".scale": as_part(scales, state)}


def joined(slots: Mapping[str, object], parameter: Tensor) -> dict[str, object]:
    """A parameter's states by name, with those that `parts_of` took apart, whole, put together again as it is placed.

    CheckpointError: it has 8-bit moments there, and not here.
    """
    found: dict[str, object] = {}
    for slot, value in slots.items():
        name, dot, part = slot.rpartition(".")
        if not dot:
            found[slot] = value
        elif part == PARTS[0]:
            from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]

            if not is_lowered(parameter):
                raise CheckpointError(
                    f"the optimizer's state has {name} of a tensor {list(parameter.shape)} in 8 bits, which is kept in "
                    "float32 here: it is of an earlier avlit; start a new run with init="
                )
            codes, scale = (like_sharded(_tensor(slots[f"{name}.{each}"]), parameter) for each in PARTS)
            is_signed = name == "exp_avg"  # the other moment is of squares
            qmap = OptimState8bit.zeros((BLOCK,), is_signed, BLOCK, parameter.device).qmap
            parts = (local(codes).clone(), local(scale).flatten().clone(), qmap)
            found[name] = as_part(OptimState8bit(*parts, is_signed, dtype=parameter.dtype), parameter)
    return found


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value
