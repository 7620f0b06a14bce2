"""`just import`: a LoRA of diffusers, ComfyUI or peft as a run, to sample, to train it on, to export it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from avlit.commands.train import settle_init
from avlit.config import Config, ConfigError, load_config, to_yaml
from avlit.errors import UserError
from avlit.settings import read_words


def main(words: Sequence[str]) -> int:
    """`file=LORA.safetensors` or a folder of peft's, `recipe=…`, and what it stands on, `init=RUN` or `model.weights=`.

    Kind, rank, scale and layers are the file's; words that say them are refused.
    """
    given = read_words(words)
    if "file" not in given:
        raise ConfigError("file=… is missing: a .safetensors file, or a folder of peft's")
    path = lora_file(Path(given.pop("file")))
    if said := [key for key in given if key == "adapter" or key.startswith("adapter.")]:
        raise ConfigError(f"{said[0]}={given[said[0]]}: the file says what adapter it holds; leave it out")
    config = load_config([f"{key}={value}" for key, value in given.items()])
    if config.init is None and config.model.weights is None:
        raise ConfigError(
            "init=… is missing: the run that the adapter was made for, or released weights as model.weights="
        )
    config, init_run = settle_init(config)

    import torch

    from avlit.adapters import AdapterState, adapter_layers
    from avlit.checkpoints import CheckpointState, load_checkpoint, save_checkpoint
    from avlit.commands.adapted import root_of, stand_on
    from avlit.commands.assembly import build_module
    from avlit.export.layouts import layer_finder, read_updates
    from avlit.runs import create_run

    tensors, settings = read_lora(path)
    module = build_module(config)
    sizes = {
        name: layer.out_features for name, layer in module.model.named_modules() if isinstance(layer, torch.nn.Linear)
    }
    finder = layer_finder(set(sizes), model=type(module.model.backbone).__name__)
    updates = read_updates(tensors, layers=finder, sizes=sizes, scaling=settings.scaling, source=str(path))
    ranks = {update.rank for update in updates.values()}
    if len(ranks) > 1:
        raise UserError(
            f"{path}: its layers have ranks {', '.join(map(str, sorted(ranks)))}; one rank can be trained on"
        )
    rank = ranks.pop()
    is_dora = any(update.magnitude is not None for update in updates.values())
    config = replace(
        config,
        adapter=replace(
            config.adapter, kind="dora" if is_dora else "lora", rank=rank, alpha=float(rank), targets=sorted(updates),
            modality=",".join(parts_of(config, set(updates))),
        ),
    )  # fmt: skip
    root = root_of(load_checkpoint(Path(config.init))) if config.init else None
    stand_on(module, config, root)
    state = AdapterState.of(module.adapter)
    if set(state.names) != set(updates):
        strange = sorted(set(state.names) ^ set(updates))
        raise UserError(f"{path}: {len(strange)} of its layers are of no part of this recipe, first {strange[0]}")
    layers = adapter_layers(module.model)
    with torch.no_grad():
        for name, update in updates.items():
            layer: Any = layers[name]
            layer.lora_A["default"].weight.copy_(update.down)
            layer.lora_B["default"].weight.copy_(update.up * update.scaling)  # alpha is the rank, the scale 1
            if update.magnitude is not None:
                layer.lora_magnitude_vector["default"].weight.copy_(update.magnitude)
    run = create_run(
        Path(config.runs_dir), config.recipe, config=to_yaml(config), init_run=init_run, init_checkpoint=config.init
    )
    saved = CheckpointState(
        step=0, seed=config.seed, recipe=config.recipe, run=run.id, base_model=module.base_model,
        adapter=module.adapter, lineage=((run.id, 0),),
    )  # fmt: skip
    save_checkpoint(run.checkpoints_dir, weights=_cpu(module.saved_weights()), state=saved)
    run.update(status="finished")
    print(f"{path}: {len(updates)} layers, rank {rank}{', DoRA' if is_dora else ''}, of {settings.layout}")
    print(f"Run {run.id} holds it: `just finetune recipe={config.recipe} init={run.id} data.root=…` trains it on")
    return 0


class Settings:
    """What a file, or the files beside it, say besides tensors. layout: whose it is, in words."""

    def __init__(self, layout: str, config: Mapping[str, object]) -> None:
        self.layout = layout
        self._alpha, self._is_rslora = config.get("lora_alpha"), bool(config.get("use_rslora"))
        patterns = config.get("alpha_pattern") or config.get("rank_pattern")
        if patterns:
            raise UserError("layers of several ranks or scales (rank_pattern, alpha_pattern) cannot be imported")

    def scaling(self, layer: str, rank: int) -> float:
        """The factor of an update where the file says none of the layer's own."""
        if self._alpha is None:
            return 1.0
        return float(str(self._alpha)) / (rank**0.5 if self._is_rslora else rank)


def lora_file(path: Path) -> Path:
    """The file itself, or the one in a folder of peft's or diffusers'. ConfigError: there is none."""
    if path.is_dir():
        names = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
        found = [path / name for name in names if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise ConfigError(f"file={path}: holds {len(found)} .safetensors files; name the file")
        return found[0]
    if path.suffix != ".safetensors" or not path.is_file():
        raise ConfigError(f"file={path}: no such .safetensors file; nothing else is read, for it may hold code")
    return path


def read_lora(path: Path) -> tuple[dict[str, Any], Settings]:
    """A file's tensors, and what is said of them in its head or in `adapter_config.json`. UserError: unreadable."""
    import json

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
            head = file.metadata() or {}
        beside = path.parent / "adapter_config.json"
        if beside.is_file():
            return tensors, Settings("peft", json.loads(beside.read_text(encoding="utf-8")))
        kept = json.loads(head.get("lora_adapter_metadata", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"file={path}: cannot be read: {error}") from error
    config = {key.removeprefix("transformer."): value for key, value in kept.items()}
    is_diffusers = any(key.startswith("transformer.") for key in tensors)
    return tensors, Settings("diffusers" if is_diffusers else "ComfyUI", config)


def parts_of(config: Config, layers: set[str]) -> list[str]:
    """Parts of the recipe's model that hold the layers."""
    import re

    return [
        name
        for name, part in config.adapter_parts.items()
        if any(re.match(pattern, layer) for pattern in part.modules for layer in layers)
    ]


def _cpu(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
