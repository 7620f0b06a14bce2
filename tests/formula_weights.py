"""Weights by a formula: with them a network that is written out again must give the numbers of the one it follows."""

from typing import TypeVar

import numpy as np
import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def wave(shape: tuple[int, ...], start: int = 0) -> np.ndarray:
    """Numbers in [-1, 1] without a pattern that a network could average out, the same everywhere."""
    return np.resize(np.sin(0.37 * np.arange(99991.0) ** 2 + start), shape)


def by_formula(network: Network) -> Network:
    """The network with such weights, of a size that keeps its features at theirs."""
    state = {}
    for number, (name, tensor) in enumerate(sorted(network.state_dict().items())):
        values = wave(tuple(tensor.shape), number)
        if tensor.dim() > 1:
            values = values * 2 / np.sqrt(tensor[0].numel())
        elif name.endswith("running_var"):
            values = 1 + 0.5 * values
        else:
            values = (1.0 if name.endswith("weight") else 0.0) + 0.2 * values
        state[name] = torch.from_numpy(np.asarray(values)).to(tensor.dtype)
    network.load_state_dict(state)
    return network.eval()
