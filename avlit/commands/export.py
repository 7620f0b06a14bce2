"""`just export`: a run's adapter, or its model, as files that other programs load; read again before it says done."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from avlit.commands.sample import newest_checkpoint, refuse_occupied
from avlit.config import Config, ConfigError, from_yaml
from avlit.runs import Run, find_run
from avlit.settings import nearest, read_words

FORMATS = ("diffusers", "comfyui", "peft", "avlit")
WORDS = ("run", "runs_dir", "format", "merge", "modality", "licence", "out", "model.weights")
FILES = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "comfyui": "lora.safetensors",
    "peft": "adapter_model.safetensors",
}
UNSTATED = "not stated; those of the base model and of the training clips apply"


def main(words: Sequence[str]) -> int:
    """`run=RUN format=diffusers|comfyui|peft|avlit` with `merge=true`, `modality=PARTS`, `licence=…`, `out=FOLDER`."""
    given = read_words(words)
    for key in given:
        if key not in WORDS:
            near = nearest(key, WORDS)
            raise ConfigError(f"{key}={given[key]}: no such word{f'; did you mean {near}?' if near else ''}")
    for key, allowed in (("format", FORMATS), ("merge", ("false", "true"))):
        if given.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"{key}={given[key]}: must be one of {', '.join(allowed)}")
    for key, example in (("run", "run=last"), ("format", "format=diffusers")):
        if key not in given:
            raise ConfigError(f"{key}=… is missing, for example {example}")
    run = find_run(Path(given.get("runs_dir", "runs")), given["run"])
    place = [f"model.weights={given['model.weights']}"] if "model.weights" in given else []
    config = from_yaml(run.read_config(), words=place, source=str(run.config_path))
    layout, is_merged = given["format"], given.get("merge") == "true"
    parts = chosen_parts(config, given, is_merged=is_merged)
    out = Path(given.get("out", run.path / "export" / (f"{layout}-merged" if is_merged else layout)))
    refuse_occupied(out)
    licence = given.get("licence", UNSTATED)
    if layout == "avlit":
        print(export_run(config, run))
    elif parts and not is_merged:
        print(export_adapter(config, run, layout, parts=parts, out=out, licence=licence))
    else:
        print(export_model(config, run, out=out, licence=licence))
    return 0


def chosen_parts(config: Config, given: dict[str, str], *, is_merged: bool) -> tuple[str, ...]:
    """The parts of the run's adapter that are exported, () for a run without one; ConfigError for what cannot be."""
    layout, adapter = given["format"], config.adapter
    if not adapter.is_on:
        for key in ("merge", "modality"):
            if key in given:
                raise ConfigError(f"{key}={given[key]}: the run has no adapter; leave it out")
        if layout != "diffusers":
            raise ConfigError(f"format={layout}: the run trained a whole model; take format=diffusers")
        return ()
    if adapter.kind == "own":
        raise ConfigError("adapter=own: trained the recipe's own modules, which no other program has; init= takes them")
    if layout in ("comfyui", "peft") and is_merged:
        raise ConfigError(f"merge=true: {layout} takes an adapter beside the model; take format=diffusers")
    if layout == "avlit" and not is_merged:
        raise ConfigError("format=avlit: the run's checkpoints are that; say merge=true for a run without adapter")
    parts = tuple(adapter.chosen(config.adapter_parts))
    if "modality" not in given:
        return parts
    if is_merged:
        raise ConfigError(f"modality={given['modality']}: a merged model has all parts; leave it out")
    wanted = [name.strip() for name in given["modality"].split(",")]
    if missing := [name for name in wanted if name not in parts]:
        raise ConfigError(f"modality={missing[0]}: the run's adapter has {', '.join(parts)}")
    return tuple(name for name in parts if name in wanted)


def export_adapter(config: Config, run: Run, layout: str, *, parts: tuple[str, ...], out: Path, licence: str) -> str:
    """Write and read again; returns in words what was found. UserError: it computes something else."""
    from safetensors.torch import save_file

    from avlit.adapters import AdapterState, take_out
    from avlit.commands.generation import load_trained
    from avlit.export import layouts, reading
    from avlit.export.card import model_card
    from avlit.export.updates import check_layers, updates_of

    checkpoint = newest_checkpoint(run, config)
    module = load_trained(config, checkpoint).cpu()
    state = AdapterState.of(checkpoint.state.adapter)
    updates = updates_of(module.model, state, parts=parts)
    backbone: Any = module.model.backbone
    class_name = type(backbone).__name__
    refuse_layers({part: state.layers[part] for part in parts}, layout, class_name=class_name, word="modality")
    origin = origin_of(config, run, checkpoint, parts=parts, licence=licence, base_model=module.base_model)
    plain: Any = copy.deepcopy(module.model)
    take_out(plain)
    stock = {name.removeprefix(layouts.BACKBONE): update for name, update in updates.items()}
    out.mkdir(parents=True, exist_ok=True)
    path, metadata = out / FILES[layout], origin.metadata
    if layout == "diffusers":
        metadata |= lora_metadata(state, list(stock))
        save_file(layouts.to_diffusers(stock), path, metadata=metadata)
        read = reading.read_with_diffusers(out, plain.backbone, updates)
    elif layout == "comfyui":
        weights = {name.removesuffix(".weight"): tensor for name, tensor in plain.backbone.state_dict().items()}
        save_file(layouts.to_comfyui(stock, model=class_name, weights=weights), path, metadata=metadata)
        read = reading.read_as_comfyui(path, plain, updates, class_name=class_name)
    else:
        save_file(layouts.to_peft(updates), path, metadata=metadata)
        peft_config(state, list(updates)).save_pretrained(str(out))
        read = reading.read_with_peft(out, plain, updates)
    error = check_layers(updates, module.model, read=read, where=str(path))
    by = "the rules that ComfyUI goes by" if layout == "comfyui" else layout
    checked = f"Read again by {by}: {len(updates)} layers compute what they did in training, to {error:.1e}."
    card = model_card(origin, layout=layout, file=path.name, class_name=class_name, checked=checked)
    (out / "README.md").write_text(card, encoding="utf-8")
    return f"{checked}\n{path} ({path.stat().st_size / 1e6:.2f} MB)"


def refuse_layers(layers: Mapping[str, Sequence[str]], layout: str, *, class_name: str, word: str) -> None:
    """Part -> its adapted layers. ConfigError where the layout, of others' programs, has no place or name for one.

    class_name: of diffusers' backbone. word: the key that chooses parts.
    """
    from avlit.export.layouts import BACKBONE, comfy_place

    if layout not in ("diffusers", "comfyui"):
        return
    adapted = [name for names in layers.values() for name in names]
    if outside := [name for name in adapted if not name.startswith(BACKBONE)]:
        inside = [part for part, names in layers.items() if all(name.startswith(BACKBONE) for name in names)]
        hint = f" or {word}={','.join(inside)}" if inside else ""
        raise ConfigError(
            f"format={layout}: {len(outside)} of the adapted layers (e.g. {outside[0]}) are not of {class_name}, which "
            f"is all that others have; take format=peft{hint}"
        )
    if layout == "comfyui":
        for name in adapted:
            comfy_place(name.removeprefix(BACKBONE), class_name)


def export_model(config: Config, run: Run, *, out: Path, licence: str) -> str:
    """The stock backbone with the adapter merged into it, or as it was trained, as a folder of diffusers."""
    import torch

    from avlit.adapters import AdapterState, merge
    from avlit.commands.generation import load_trained
    from avlit.errors import UserError
    from avlit.export.card import model_card
    from avlit.export.layouts import BACKBONE

    checkpoint = newest_checkpoint(run, config)
    module = load_trained(config, checkpoint).cpu()
    if config.adapter.is_on:
        outside = [name for name in AdapterState.of(checkpoint.state.adapter).names if not name.startswith(BACKBONE)]
        if outside:
            raise ConfigError(
                f"merge=true format=diffusers: {len(outside)} adapted layers (e.g. {outside[0]}) are not of the stock "
                "model; take format=avlit merge=true, or format=peft"
            )
        merge(module.model)
    backbone: Any = module.model.backbone
    name, folder = type(backbone).__name__, out / "transformer"
    backbone.save_pretrained(folder, safe_serialization=True)
    again = type(backbone).from_pretrained(
        folder, local_files_only=True, use_safetensors=True, torch_dtype=next(backbone.parameters()).dtype
    )
    wanted, found = backbone.state_dict(), again.state_dict()
    if wanted.keys() != found.keys() or not all(torch.equal(wanted[key], found[key]) for key in wanted):
        raise UserError(f"{folder}: diffusers reads other weights than were written; nothing can be relied on there")
    checked = f"Read again by diffusers: all {len(wanted)} tensors of {name} are as they were written, bit for bit."
    origin = replace(
        origin_of(config, run, checkpoint, parts=(), licence=licence, base_model=module.base_model), state=None
    )
    card = model_card(origin, layout="model", file="", class_name=name, checked=checked)
    (out / "README.md").write_text(card, encoding="utf-8")
    return f"{checked}\n{folder}"


def export_run(config: Config, run: Run) -> str:
    """A run whose one checkpoint is the whole model with the adapter merged: for `init=` and `just sample`."""
    from avlit.adapters import merge
    from avlit.checkpoints import save_checkpoint
    from avlit.commands.generation import load_trained
    from avlit.config import AdapterConfig, to_yaml
    from avlit.runs import create_run

    checkpoint = newest_checkpoint(run, config)
    module = load_trained(config, checkpoint).cpu()
    merge(module.model)
    plain = replace(config, adapter=AdapterConfig(), init=None, model=replace(config.model, weights=None))
    merged = create_run(run.path.parent, run.recipe, config=to_yaml(plain), init_run=run.id)
    state = replace(
        checkpoint.state, run=merged.id, step=0, base_model="", adapter={}, optimizer={}, extra={},
        lineage=(*checkpoint.state.lineage, (merged.id, 0)),
    )  # fmt: skip
    weights = {name: tensor.detach().clone() for name, tensor in module.model.state_dict().items()}
    folder = save_checkpoint(merged.checkpoints_dir, weights=weights, state=state)
    merged.update(status="finished")
    return f"{folder}: run {merged.id} holds the model with the adapter merged into it"


def origin_of(
    config: Config, run: Run, checkpoint: Any, *, parts: tuple[str, ...], licence: str, base_model: str
) -> Any:
    """What is said of an export."""
    from avlit.adapters import AdapterState
    from avlit.export.card import Origin

    training = {
        "steps": str(checkpoint.step),
        "batch_size": str(config.data.batch_size),
        "learning_rate": f"{config.optimizer.lr:g}",
        "size": config.size,
        "clips": config.data.root or "the embedded corpus",
    }
    losses = run.path / "finetune.json"
    if losses.exists():
        for name, change in json.loads(losses.read_text(encoding="utf-8")).items():
            training[f"loss_{name}"] = f"{change['before']:.4f} before, {change['after']:.4f} after"
    return Origin(
        version=version("avlit"),
        recipe=config.recipe,
        run=run.id,
        step=checkpoint.step,
        base_model=base_model,
        licence=licence,
        state=AdapterState.of(checkpoint.state.adapter) if checkpoint.state.adapter else None,
        parts=parts,
        training=training,
    )


def peft_config(state: Any, layers: list[str]) -> Any:
    """The adapter's settings as peft keeps them, for layers of these names."""
    from peft import LoraConfig

    return LoraConfig(
        r=state.rank,
        lora_alpha=state.alpha,
        target_modules=layers,
        use_dora=state.kind == "dora",
        use_rslora=state.kind == "rslora",
        inference_mode=True,
    )


def lora_metadata(state: Any, layers: list[str]) -> dict[str, str]:
    """What diffusers keeps of an adapter's settings; its scale is in the tensors."""
    settings = {
        "r": state.rank, "lora_alpha": state.rank, "target_modules": layers, "use_dora": state.kind == "dora",
    }  # fmt: skip
    prefixed = {f"transformer.{key}": value for key, value in settings.items()}
    return {"lora_adapter_metadata": json.dumps(prefixed, indent=2, sort_keys=True)}
