"""Released weights: a file of tensors by name, read into a network of ours, or a folder in transformers' layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from avlit.errors import UserError
from avlit.metrics.metric import Tools, Weights

Network = TypeVar("Network", bound=nn.Module)


def read_state(path: Path, *, inside: str | None = None) -> Mapping[str, Tensor]:
    """Name -> tensor of a safetensors file, or of a pickle of nothing but tensors: no other one is run.

    inside: where a pickle holds the tensors among other plain values. OSError, ValueError: it is neither.
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
    if inside is not None and isinstance(state, Mapping):
        state = state.get(inside, state)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("is no file of tensors by name")
    return state


def load_weights(
    network: Network,
    need: Weights,
    tools: Tools,
    *,
    file: str = "",
    inside: str | None = None,
    has_others: bool = False,
    named: Callable[[str], str] = str,
) -> Network:
    """The network with its released weights, every one of them, ready to measure. UserError: they are of another.

    file: its name where a folder is given. inside: as of `read_state`. has_others: it may hold tensors that the
    network has no use for. named: a name in the file -> the network's.
    """
    path = tools.weights[need.key]
    try:
        state = {named(name): tensor for name, tensor in read_state(path / file, inside=inside).items()}
        if has_others:
            state = {name: state[name] for name in network.state_dict() if name in state}
        network.load_state_dict(state)
    except (OSError, ValueError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = " ".join(lines[:2])[:300]
        raise UserError(f"weights.{need.key}={path}: is not {need.about} ({reason})") from error
    return network.eval().requires_grad_(False).to(tools.device)


def load_folder(kind: Any, need: Weights, tools: Tools) -> Any:
    """A model, a processor or a tokenizer of transformers' from the folder; no pickle is run, nothing is fetched.

    UserError: the folder is of another one.
    """
    folder = tools.weights[need.key]
    try:  # what has no weights takes no notice of the word
        found = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"weights.{need.key}={folder}: cannot be read ({reason})") from error
    return found.eval().requires_grad_(False).to(tools.device) if isinstance(found, nn.Module) else found
