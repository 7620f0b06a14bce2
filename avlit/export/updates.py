"""A low-rank adapter as plain tensors, layer by layer: what lies between a module and every file layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from avlit.adapters import NAME, AdapterState, adapter_layers
from avlit.errors import UserError

TOLERANCE = 1e-5
"""How far an output may be from the module's, over the largest of its values: rounding in another order."""


@dataclass(frozen=True)
class Update:
    """One layer's update: weight + scaling * up @ down, rows then brought to `magnitude` where it is DoRA's.

    down [R, in], up [out, R], magnitude [out] or None; all float32 on the CPU.
    """

    down: Tensor
    up: Tensor
    scaling: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]

    def on(self, weight: Tensor) -> Tensor:
        """The weight [out, in] that a layer has with the update."""
        changed = weight.float() + self.scaling * (self.up @ self.down)
        if self.magnitude is None:
            return changed
        return changed * (self.magnitude / changed.norm(dim=1))[:, None]


def updates_of(model: nn.Module, state: AdapterState, *, parts: tuple[str, ...]) -> dict[str, Update]:
    """Layer -> update of the parts, from a model with an adapter in it."""
    there = adapter_layers(model)
    found = {}
    for name in (name for part in parts for name in state.layers[part]):
        layer: Any = there[name]
        magnitude = layer.lora_magnitude_vector[NAME].weight if state.kind == "dora" else None
        found[name] = Update(
            _plain(layer.lora_A[NAME].weight),
            _plain(layer.lora_B[NAME].weight),
            state.scaling,
            None if magnitude is None else _plain(magnitude),
        )
    return found


@torch.no_grad()
def check_layers(
    updates: Mapping[str, Update], model: nn.Module, *, read: Mapping[str, nn.Module], where: str
) -> float:
    """The largest error of what the layers `read` make of noise, over their largest output, against the model's own.

    updates, read: layer of the model -> its update, and the layer that another program made of the file. UserError: one
    differs by more than rounding, or is missing.
    """
    worst = 0.0
    for name in updates:
        if name not in read:
            raise UserError(f"{where}: {name} was not read again; nothing can be relied on in that file")
        ours, theirs = model.get_submodule(name), read[name]
        noise = torch.randn(4, updates[name].down.shape[1], generator=torch.Generator().manual_seed(0))
        wanted, found = ours(noise.to(_dtype(ours))).float(), theirs(noise.to(_dtype(theirs))).float()
        error = float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-12))
        if not error <= (TOLERANCE if _dtype(ours) == torch.float32 else 2e-2):
            raise UserError(f"{where}: {name} computes something else when it is read again (error {error:.1e})")
        worst = max(worst, error)
    return worst


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous().clone()


def _dtype(layer: nn.Module) -> torch.dtype:
    base: Any = getattr(layer, "base_layer", layer)
    return base.weight.dtype
