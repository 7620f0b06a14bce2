"""Adapters in other programs' files: read again they compute the same, and a file read in is the adapter it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_ltx2_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from safetensors import safe_open
from safetensors.torch import save_file

from avlit.checkpoints import CheckpointState, save_checkpoint
from avlit.commands import export, import_adapter
from avlit.commands.adapted import go_on_with, root_of, stand_on
from avlit.commands.assembly import build_module
from avlit.commands.finetune import read_request
from avlit.commands.first_weights import start_weights
from avlit.commands.generation import load_trained
from avlit.commands.sample import newest_checkpoint
from avlit.config import AdapterConfig, Config, ConfigError, from_yaml, load_config, to_yaml
from avlit.errors import UserError
from avlit.export import layouts
from avlit.inherit import resolve_weights
from avlit.runs import Run, create_run, list_runs
from tests.kill_fuzz import tiny


def saved(config: Config, runs: Path, *, weights: dict[str, Any], **state: Any) -> Run:
    """A run with one checkpoint, as if it had been trained."""
    run = create_run(runs, config.recipe, config=to_yaml(config), init_checkpoint=config.init)
    kept = {name: tensor.detach().clone() for name, tensor in weights.items()}
    save_checkpoint(
        run.checkpoints_dir,
        weights=kept,
        state=CheckpointState(step=3, seed=0, recipe=config.recipe, run=run.id, lineage=((run.id, 3),), **state),
    )
    return run


def adapter_run(runs: Path, recipe: str, *words: str, kind: str = "lora", **adapter: Any) -> Run:
    """A tiny base of random weights, and on it an adapter whose updates are random."""
    given = [*tiny([f"recipe={recipe}"]), f"recipe={recipe}", f"runs_dir={runs}", "train.accelerator=cpu", *words]
    config = load_config(given)
    base = saved(config, runs, weights=build_module(config).model.state_dict())
    path = str(resolve_weights(base.path).path)
    config = replace(config, init=path, adapter=AdapterConfig(kind=kind, rank=4, **adapter))  # pyright: ignore
    module = build_module(config)
    stand_on(module, config, resolve_weights(base.path))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.trained_parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return saved(config, runs, weights=module.saved_weights(), base_model=module.base_model, adapter=module.adapter)


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    """What the run's model computes with: every weight, updates added."""
    from avlit.adapters import merge

    config = from_yaml(run.read_config())
    module = load_trained(config, newest_checkpoint(run, config))
    merge(module.model)
    return module.model.state_dict()


@pytest.mark.parametrize(
    ("recipe", "layout", "words", "adapter"),
    [
        ("mtv_stage5", "diffusers", (), {"alpha": 6.0, "modality": "video"}),
        ("mtv_stage5", "comfyui", (), {"kind": "dora", "modality": "video"}),
        ("mtv_stage5", "peft", (), {"kind": "rslora", "alpha": 3.0}),
        ("mtv_stage5", "diffusers", (), {"kind": "dora", "alpha": 6.0, "modality": "video"}),
        ("mmcontrol_backbone", "comfyui", (), {"alpha": 6.0}),
        ("jova_stage1_video", "comfyui", (), {"alpha": 6.0}),
        ("jova_stage2", "peft", (), {"kind": "dora"}),
    ],
)
def test_an_export_is_read_again_and_imported_computes_the_same(
    tmp_path: Path, recipe: str, layout: str, words: tuple[str, ...], adapter: dict[str, Any]
):
    run = adapter_run(tmp_path / "runs", recipe, *words, **adapter)
    assert export.main([f"run={run.path}", f"format={layout}", f"out={tmp_path}/out", "licence=Apache-2.0"]) == 0
    path = tmp_path / "out" / export.FILES[layout]
    with safe_open(path, framework="pt") as file:
        head = file.metadata()
    assert head["rank"] == "4" and head["licence"] == "Apache-2.0" and len(head["base_model_fingerprint"]) == 32
    assert head["avlit_version"] and head["training.steps"] == "3"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: Apache-2.0" in card and head["base_model_fingerprint"] in card and "compute what they did" in card

    config = from_yaml(run.read_config())
    given = [*tiny([f"recipe={recipe}"]), f"recipe={recipe}", f"init={config.init}", f"runs_dir={tmp_path}/runs"]
    assert import_adapter.main([f"file={path}", "train.accelerator=cpu", *words, *given]) == 0
    again = list_runs(tmp_path / "runs")[-1]
    assert again.id != run.id
    going_on = [word for word in given if not word.startswith(("init=", "data.num_clips="))]
    going_on += ["data.root=my_clips", f"init={again.path}"]
    continued = read_request(going_on).config
    module = build_module(continued)
    stand_on(module, continued, root_of(resolve_weights(again.path)))
    go_on_with(module, resolve_weights(again.path))  # what a training from it does first
    wanted, found = weights_of(run), weights_of(again)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_names_for_comfyui_are_those_that_diffusers_reads_back():
    update = layouts.Update(torch.randn(2, 6), torch.randn(6, 2), 1.0)
    wan = [f"blocks.0.attn{n}.{each}" for n in (1, 2) for each in ("to_q", "to_k", "to_v", "to_out.0")]
    wan += ["blocks.0.ffn.net.0.proj", "blocks.0.ffn.net.2"]
    ltx = ["transformer_blocks.0.attn1.to_q", "transformer_blocks.3.audio_to_video_attn.to_out.0"]
    ltx += list(layouts.COMFY_ENDS["LTX2VideoTransformer3DModel"])
    cases = (
        ("WanTransformer3DModel", wan, _convert_non_diffusers_wan_lora_to_diffusers),
        ("LTX2VideoTransformer3DModel", ltx, _convert_non_diffusers_ltx2_lora_to_diffusers),
    )
    for model, names, convert in cases:
        tensors = layouts.to_comfyui(dict.fromkeys(names, update), model=model, weights={})
        plain = {
            key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): tensor
            for key, tensor in tensors.items()
            if not key.endswith(".alpha")
        }
        read = convert(plain)
        expected = {f"transformer.{name}.lora_{each}.weight" for name in names for each in "AB"}
        assert set(read) == expected, model
    with pytest.raises(UserError, match=r"no name is known for condition_embedder.time_proj of WanTransformer3DModel"):
        layouts.comfy_name("condition_embedder.time_proj", "WanTransformer3DModel")


HUNYUAN = "HunyuanVideoTransformer3DModel"


@pytest.mark.parametrize("is_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("adapted", [("to_q", "to_k", "to_v", "proj_mlp"), ("to_q", "to_v")], ids=["all", "some"])
def test_updates_of_what_comfyui_keeps_as_one_layer_are_one_and_come_apart_again(
    adapted: tuple[str, ...], is_dora: bool
):
    rows = {"attn.to_q": 6, "attn.to_k": 6, "attn.to_v": 6, "proj_mlp": 24}
    weights = {f"single_transformer_blocks.3.{name}": torch.randn(size, 6) for name, size in rows.items()}
    updates = {
        name: layouts.Update(
            torch.randn(2, 6), torch.randn(len(weight), 2), 0.7, 3 * torch.rand(len(weight)) if is_dora else None
        )
        for name, weight in weights.items()
        if name.endswith(adapted)
    }
    tensors = layouts.to_comfyui(updates, model=HUNYUAN, weights=weights)
    assert {key.removeprefix("diffusion_model.").partition(".l")[0] for key in tensors if "lora" in key} == {
        "single_blocks.3"
    }
    down, up = (tensors[f"diffusion_model.single_blocks.3.linear1.lora_{each}.weight"] for each in ("down", "up"))
    assert down.shape == (2 * len(adapted), 6) and up.shape == (42, 2 * len(adapted))
    fused = torch.cat(list(weights.values()))
    merged = fused + tensors["diffusion_model.single_blocks.3.linear1.alpha"] / len(down) * (up @ down)
    if is_dora:
        merged *= tensors["diffusion_model.single_blocks.3.linear1.dora_scale"] / merged.norm(dim=1, keepdim=True)
    expected = [updates[name].on(weight) if name in updates else weight for name, weight in weights.items()]
    torch.testing.assert_close(merged, torch.cat(expected), rtol=1e-5, atol=1e-6)

    finder = layouts.layer_finder({f"backbone.{name}" for name in weights}, model=HUNYUAN)
    sizes = {f"backbone.{name}": len(weight) for name, weight in weights.items()}
    read = layouts.read_updates(tensors, layers=finder, sizes=sizes, scaling=lambda *_: 1.0, source="file")
    assert {update.rank for update in read.values()} == {2}
    assert is_dora or read.keys() == {f"backbone.{name}" for name in updates}
    for name, weight in weights.items():
        found = read[f"backbone.{name}"].on(weight) if f"backbone.{name}" in read else weight
        torch.testing.assert_close(found, updates[name].on(weight) if name in updates else weight, rtol=1e-5, atol=1e-6)


def test_an_update_that_was_trained_on_one_layer_of_comfyui_is_that_of_all_its_parts():
    whole = {
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight": torch.randn(3, 6),
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight": torch.randn(18, 3),
        "diffusion_model.double_blocks.0.txt_attn.qkv.lora_down.weight": torch.randn(3, 6),
        "diffusion_model.double_blocks.0.txt_attn.qkv.lora_up.weight": torch.zeros(18, 3),
    }
    names = [f"backbone.transformer_blocks.0.attn.{each}" for each in ("to_q", "to_k", "to_v")]
    text = [f"backbone.transformer_blocks.0.attn.add_{each}_proj" for each in "qkv"]
    finder = layouts.layer_finder({*names, *text}, model=HUNYUAN)
    sizes = dict.fromkeys([*names, *text], 6)
    read = layouts.read_updates(whole, layers=finder, sizes=sizes, scaling=lambda *_: 0.5, source="file")
    assert read.keys() == {*names, *text} and {update.rank for update in read.values()} == {3}
    down, up = (whole[f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{each}.weight"] for each in ("down", "up"))
    assert torch.equal(torch.cat([read[name].on(torch.zeros(6, 6)) for name in names]), 0.5 * (up @ down))
    with pytest.raises(UserError, match="has 18 rows there, and 15 in this model"):
        layouts.read_updates(
            whole, layers=finder, sizes={**sizes, names[0]: 3}, scaling=lambda *_: 1.0, source="file"
        )  # fmt: skip


def test_a_merged_model_and_a_merged_run_compute_what_the_adapter_did(tmp_path: Path):
    run = adapter_run(tmp_path / "runs", "mtv_stage5", modality="video")
    wanted = weights_of(run)
    assert export.main([f"run={run.path}", "format=diffusers", "merge=true", f"out={tmp_path}/out"]) == 0
    loaded: Any = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, wanted[f"backbone.{name}"]), name
    assert export.main([f"run={run.path}", "format=avlit", "merge=true"]) == 0
    merged = list_runs(tmp_path / "runs")[-1]
    config = from_yaml(merged.read_config())
    assert not config.adapter.is_on and config.init is None
    found = resolve_weights(merged.path).weights()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_others_cannot_load_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = adapter_run(tmp_path / "runs", "mtv_stage5")

    def refused(*words: str) -> str:
        with pytest.raises(UserError) as caught:
            export.main([f"run={run.path}", *words])
        return str(caught.value)

    assert "format=… is missing" in refused()
    assert "format=diffuser: must be one of diffusers, comfyui, peft, avlit" in refused("format=diffuser")
    assert "are not of CogVideoXTransformer3DModel" in (message := refused("format=diffusers"))
    assert "take format=peft or modality=video" in message
    assert "modality=audio: the run's adapter has video, controlnet" in refused("format=peft", "modality=audio")
    assert "peft takes an adapter beside the model" in refused("format=peft", "merge=true")
    assert "adapted layers" in refused("format=diffusers", "merge=true")
    assert "rnak=4: no such word" in refused("format=peft", "rnak=4")

    def scaled(updates: dict[str, layouts.Update], **others: Any) -> dict[str, torch.Tensor]:
        return {key: 1.01 * tensor for key, tensor in real(updates, **others).items()}

    real = layouts.to_comfyui
    monkeypatch.setattr(layouts, "to_comfyui", scaled)
    assert "computes something else when it is read again" in refused("format=comfyui", "modality=video")


def test_a_file_that_is_of_another_model_is_refused(tmp_path: Path):
    run = adapter_run(tmp_path / "runs", "mtv_stage5", modality="video")
    init = from_yaml(run.read_config()).init
    words = [*tiny(["recipe=mtv_stage5"]), "recipe=mtv_stage5", f"init={init}", f"runs_dir={tmp_path}/runs"]
    tensors = layouts.to_peft({"backbone.nowhere": layouts.Update(torch.ones(2, 4), torch.ones(4, 2), 1.0)})
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"2 of its 2 tensors have no place in this model, first base_model"):
        import_adapter.main([f"file={tmp_path}/other.safetensors", *words])
    half = {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 4)}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match=r"has only down; an update has two halves"):
        import_adapter.main([f"file={tmp_path}/half.safetensors", *words])
    (tmp_path / "lora.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"nothing else is read, for it may hold code"):
        import_adapter.main([f"file={tmp_path}/lora.bin", *words])
    with pytest.raises(ConfigError, match=r"adapter.rank=3: the file says what adapter it holds"):
        import_adapter.main([f"file={tmp_path}/half.safetensors", *words, "adapter.rank=3"])


def test_an_adapter_of_a_bypass_finds_the_bypass_and_the_backbone_below_it(tmp_path: Path):
    runs = tmp_path / "runs"
    given = [*tiny(["recipe=mmcontrol"]), f"runs_dir={runs}", "train.accelerator=cpu"]

    def trained(config: Config) -> Run:
        """A run that starts as a session would, and saves what it would save, a little moved."""
        run = create_run(runs, config.recipe, config=to_yaml(config), init_checkpoint=config.init)
        module = build_module(config)
        start_weights(module, config, run, None)
        with torch.no_grad():
            for parameter in module.trained_parameters.values():
                parameter.add_(0.01)
        state = CheckpointState(
            step=1, seed=0, recipe=config.recipe, run=run.id, base_model=module.base_model, adapter=module.adapter
        )
        save_checkpoint(run.checkpoints_dir, weights=module.saved_weights(), state=state)
        return run

    def newest(run: Run) -> str:
        return str(resolve_weights(run.path).path)

    backbone = trained(load_config([*given, "recipe=mmcontrol_backbone"]))
    bypass = trained(load_config([*given, "recipe=mmcontrol", f"init={newest(backbone)}"]))
    adapter = trained(
        load_config([*given, "recipe=mmcontrol", f"init={newest(bypass)}", "adapter=lora", "adapter.rank=2"])
    )
    assert not any(name.startswith("backbone.") for name in resolve_weights(bypass.path).weights())
    found, below = weights_of(adapter), weights_of(bypass)
    assert found.keys() == below.keys()
    changed = {name.partition(".")[0] for name in found if not torch.equal(found[name], below[name])}
    assert changed == {"bypass"}
