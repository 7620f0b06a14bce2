"""AdamW whose moments are kept in 8 bits, block by block (arXiv 2110.02861), from torchao, an optional library."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from avlit.config import OptimizerConfig
from avlit.errors import ConfigError

PARTS = ("codes", "scale")
"""What of an 8-bit moment is saved: a byte for each value, a scale for each block of 256; the rest is constant."""


def has_torchao() -> bool:
    """Whether torchao can be imported."""
    return find_spec("torchao") is not None


def build_adamw_8bit(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with 8-bit moments for tensors of 4096 values and more, if blocks divide them; float32 for the others.

    It reads `found_inf` as torch's fused AdamW does, but on the host: every step waits for the device once.
    ConfigError: torchao is not installed.
    """
    if not has_torchao():
        raise ConfigError("optimizer.states=8bit: needs torchao; `pip install torchao`, or set optimizer.states=fp32")
    from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    class LeavingOut(AdamW8bit):
        found_inf: Tensor | None = None

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


def is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it keeps 8-bit moments."""
    return hasattr(optimizer, "block_size")


def parts_of(state: Tensor) -> dict[str, Tensor]:
    """What is saved of an optimizer's state: ending of its name -> tensor; one without an ending if it is plain."""
    if all(hasattr(state, part) for part in PARTS):
        return {f".{part}": getattr(state, part) for part in PARTS}
    return {"": state}


def joined(slots: Mapping[str, object], parameter: Tensor) -> dict[str, object]:
    """A parameter's states by name, with those that `parts_of` took apart put together again on its device."""
    found: dict[str, object] = {}
    for slot, value in slots.items():
        name, dot, part = slot.rpartition(".")
        if not dot:
            found[slot] = value
        elif part == PARTS[0]:
            from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]

            codes, scale = (_tensor(slots[f"{name}.{each}"]).to(parameter.device, copy=True) for each in PARTS)
            is_signed = name == "exp_avg"  # the other moment is of squares
            qmap = OptimState8bit.zeros((256,), is_signed, 256, parameter.device).qmap
            found[name] = OptimState8bit(codes, scale, qmap, is_signed, dtype=parameter.dtype)
    return found


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value
