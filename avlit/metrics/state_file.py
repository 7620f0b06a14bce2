"""Weights that are released as a file of tensors by name, read into a network that is written out here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from avlit.errors import UserError
from avlit.metrics.metric import Tools, Weights

Network = TypeVar("Network", bound=nn.Module)


def read_state(path: Path) -> Mapping[str, Tensor]:
    """Name -> tensor of a safetensors file, or of a pickle of nothing but tensors: no other one is run.

    OSError, ValueError: it is neither.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, SafetensorError, EOFError, ModuleNotFoundError) as error:
        raise ValueError(next(iter(str(error).splitlines()), repr(error))) from error
    except Exception as error:  # the unpickler's own, which has no other base class
        if type(error).__module__ not in ("_pickle", "pickle"):
            raise
        raise ValueError("holds more than tensors, which is not run") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("is no file of tensors by name")
    return state


def load_weights(network: Network, need: Weights, tools: Tools) -> Network:
    """The network with its released weights, every one of them, ready to measure. UserError: they are of another."""
    path = tools.weights[need.key]
    try:
        network.load_state_dict(read_state(path))
    except (OSError, ValueError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = " ".join(lines[:2])[:300]
        raise UserError(f"weights.{need.key}={path}: is not {need.about} ({reason})") from error
    return network.eval().requires_grad_(False).to(tools.device)
