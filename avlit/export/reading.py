"""Written files read again the way other programs do: an export is done only when this computes what the run does."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from avlit.errors import UserError
from avlit.export.layouts import BACKBONE, comfy_place

PARTS = ("lora_up.weight", "lora_down.weight", "alpha", "dora_scale")
"""What ComfyUI reads of a layer."""


def read_with_diffusers(folder: Path, stock: Any, names: Iterable[str]) -> dict[str, nn.Module]:
    """The layers of a stock transformer that has loaded the file, by diffusers itself; names as in our model."""
    stock.load_lora_adapter(folder, prefix="transformer", local_files_only=True, use_safetensors=True)
    return {name: stock.get_submodule(name.removeprefix(BACKBONE)) for name in names}


def read_with_peft(folder: Path, model: Any, names: Iterable[str]) -> dict[str, nn.Module]:
    """The layers of a network without adapter that has loaded the folder, by peft itself."""
    from peft import PeftModel

    loaded: Any = PeftModel.from_pretrained(model, folder, local_files_only=True, use_safetensors=True).eval()
    return {name: loaded.base_model.model.get_submodule(name) for name in names}


def read_as_comfyui(path: Path, model: nn.Module, names: Iterable[str], *, class_name: str) -> dict[str, nn.Module]:
    """The layers as ComfyUI patches them: weight + alpha / rank * up @ down, then rows of the length `dora_scale`.

    UserError: the file has tensors that no layer of the model is patched with; ComfyUI would pass over them.
    """
    tensors, used, layers = load_file(path), set(), {}
    places = dict(comfy_place(name.removeprefix(BACKBONE), class_name) for name in names)
    for place, members in places.items():
        key = f"diffusion_model.{place}"
        parts = {each: tensors.get(f"{key}.{each}") for each in PARTS}
        used |= {f"{key}.{each}" for each, tensor in parts.items() if tensor is not None}
        whole: list[Any] = [model.get_submodule(BACKBONE + name) for name in members]  # one layer of ComfyUI's
        weight = _patched(torch.cat([layer.weight.detach().float() for layer in whole]), parts)
        rows = weight.split([layer.out_features for layer in whole])
        for name, layer, own in zip(members, whole, rows, strict=True):
            patched = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            patched.weight = nn.Parameter(own)
            if layer.bias is not None:
                patched.bias = nn.Parameter(layer.bias.detach().float())
            layers[BACKBONE + name] = patched
    if strange := sorted(tensors.keys() - used):
        raise UserError(f"{path}: {len(strange)} tensors patch no layer, first {strange[0]}")
    return layers


def _patched(weight: Tensor, parts: Mapping[str, Tensor | None]) -> Tensor:
    up, down, alpha, lengths = (parts[key] for key in PARTS)
    if up is None or down is None:
        return weight
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    changed = weight + scale * torch.mm(up, down)
    return changed if lengths is None else changed * (lengths / changed.norm(dim=1, keepdim=True))
