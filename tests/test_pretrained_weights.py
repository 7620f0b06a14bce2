import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from avlit.models.mst_controlnet import MSTControlNet, build_backbone, build_mst_controlnet
from avlit.models.pretrained import load_backbone
from avlit.models.sizes import MSTControlNetConfig

TINY = MSTControlNetConfig(
    num_layers=2,
    num_heads=2,
    head_dim=16,
    in_channels=8,
    out_channels=4,
    text_dim=12,
    max_text_tokens=6,
    time_embed_dim=16,
    sample_height=4,
    sample_width=4,
    sample_frames=5,
    wan_ffn_dim=48,
    wan_freq_dim=16,
    audio_layers=2,
    audio_dim=4,
    audio_hidden=8,
    audio_tokens=2,
    control_dim=16,
    interaction_heads=2,
    num_interaction_blocks=1,
)
TINY_WAN = replace(TINY, variant="wan", in_channels=4)
BOTH = pytest.mark.parametrize("config", [TINY, TINY_WAN], ids=["cogvideox", "wan"])
FILE = "diffusion_pytorch_model.safetensors"


def release(config: MSTControlNetConfig, folder: Path, *, shard_size: str = "1GB") -> dict[str, torch.Tensor]:
    """A released folder of this size with its own weights, as diffusers writes it; returns those weights."""
    backbone = build_backbone(config)
    with torch.no_grad():
        for tensor in backbone.state_dict().values():
            tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(9))
    backbone.save_pretrained(folder, max_shard_size=shard_size)
    return {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}


def example(config: MSTControlNetConfig) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    tracks = {name: torch.randn(1, 5, 2, 4, generator=random) for name in ("speech", "effects", "music")}
    latents = torch.randn(1, config.out_channels, 2, 4, 4, generator=random)
    return {"noisy_latents": latents, "timestep": torch.tensor([500]), "text": torch.randn(1, 6, 12), **tracks}


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"], ids=["single", "sharded"])
@BOTH
def test_every_tensor_of_the_backbone_comes_from_the_folder(tmp_path, config, shard_size):
    weights = release(config, tmp_path / "released" / "transformer", shard_size=shard_size)
    shards = len(list((tmp_path / "released" / "transformer").glob("*.safetensors")))
    assert shards == 1 if shard_size == "1GB" else shards > 1
    model = build_mst_controlnet(config)
    control = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in weights}

    for folder in (tmp_path / "released", tmp_path / "released" / "transformer"):
        report = load_backbone(model, folder)
        state = model.state_dict()
        assert all(torch.equal(state[name], weights[name]) for name in weights)
        assert all(torch.equal(state[name], control[name]) for name in control)
        assert set(report.loaded) == set(weights)
        assert set(report.new) == set(control)
        assert report.unused == ()
    assert str(report).endswith(f"{len(weights)} tensors loaded, {len(control)} new (control, injections), 0 unused")


def test_tensors_without_a_place_are_reported(tmp_path):
    release(TINY, tmp_path)
    save_file({**load_file(tmp_path / FILE), "ema.decay": torch.ones(1)}, tmp_path / FILE)
    report = load_backbone(build_mst_controlnet(TINY), tmp_path)
    assert report.unused == ("ema.decay",)
    assert "1 unused, e.g. ema.decay" in str(report)


def test_values_are_cast_to_the_models_precision(tmp_path):
    weights = release(TINY, tmp_path)
    save_file({name: tensor.bfloat16() for name, tensor in load_file(tmp_path / FILE).items()}, tmp_path / FILE)
    model = build_mst_controlnet(TINY)
    load_backbone(model, tmp_path)
    state = model.state_dict()
    assert all(torch.equal(state[name], weights[name].bfloat16().float()) for name in weights)


@BOTH
def test_a_model_built_on_the_meta_device_loads_and_runs(tmp_path, config):
    release(config, tmp_path)
    ordinary = build_mst_controlnet(config)
    load_backbone(ordinary, tmp_path)
    with torch.device("meta"):
        model = build_mst_controlnet(config)
    load_backbone(model, tmp_path)
    model.draw_control()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    x = example(config)
    with torch.no_grad():
        assert torch.equal(model(**x), ordinary(**x))  # the control, drawn anew, starts at zero
        if config.variant == "wan":  # the rotary buffers are not part of a checkpoint
            stock = model.backbone(x["noisy_latents"], x["timestep"], x["text"]).sample
            assert torch.equal(model(**x), stock)


def refused(model: MSTControlNet, folder: Path, message: str) -> None:
    """The folder is refused with this message and the model is as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_backbone(model, folder)
    assert f"model.weights={folder}" in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, "num_layers: expected 2, found 3"),
        ({"head_dim": 32}, "attention_head_dim: expected 16, found 32"),
        ({"in_channels": 4}, "in_channels: expected 8, found 4"),
        (
            {"sample_frames": 9, "text_dim": 20},
            "text_embed_dim: expected 12, found 20; .*sample_frames: expected 5, found 9",
        ),
        ({"learned_positions": False}, "use_learned_positional_embeddings: expected True, found False"),
    ],
)
def test_another_size_is_refused_with_what_differs(tmp_path, changes, message):
    release(replace(TINY, **changes), tmp_path)
    refused(build_mst_controlnet(TINY), tmp_path, message)


def test_another_class_is_refused(tmp_path):
    release(TINY_WAN, tmp_path)
    refused(
        build_mst_controlnet(TINY), tmp_path, "expected a CogVideoXTransformer3DModel, found 'WanTransformer3DModel'"
    )


def test_a_value_the_released_config_leaves_out_is_the_stock_default(tmp_path):
    release(TINY, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("patch_size_t", "norm_eps", "temporal_compression_ratio"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_backbone(build_mst_controlnet(TINY), tmp_path)
    del config["num_layers"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(build_mst_controlnet(TINY), tmp_path, "num_layers: expected 2, found 30")


def test_a_folder_without_config_is_refused(tmp_path):
    refused(build_mst_controlnet(TINY), tmp_path, "no config.json there or in its transformer/ subfolder")
    refused(build_mst_controlnet(TINY), tmp_path / "absent", "no config.json")


@pytest.mark.parametrize("text", ["not json", "[]", "null"])
def test_an_unreadable_config_is_refused(tmp_path, text):
    release(TINY, tmp_path)
    (tmp_path / "config.json").write_text(text)
    refused(build_mst_controlnet(TINY), tmp_path, r"config\.json is not readable")


def test_pickled_weights_are_never_read(tmp_path):
    release(TINY, tmp_path)
    (tmp_path / FILE).unlink()
    refused(build_mst_controlnet(TINY), tmp_path, "no weights; expected")
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    refused(build_mst_controlnet(TINY), tmp_path, r"only pickled weights \(diffusion_pytorch_model.bin\)")


def test_a_missing_tensor_is_refused(tmp_path):
    release(TINY, tmp_path)
    weights = load_file(tmp_path / FILE)
    del weights["proj_out.weight"]
    save_file(weights, tmp_path / FILE)
    refused(build_mst_controlnet(TINY), tmp_path, "1 of the backbone's .* not in the folder, e.g. proj_out.weight")


def test_a_wrong_shape_is_refused_before_anything_is_written(tmp_path):
    release(TINY, tmp_path)
    weights = load_file(tmp_path / FILE)
    weights["time_embedding.linear_1.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / FILE)
    refused(build_mst_controlnet(TINY), tmp_path, r"time_embedding.linear_1.weight is \(3, 3\), expected \(16, 32\)")


def test_a_truncated_file_is_refused(tmp_path):
    release(TINY, tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    refused(build_mst_controlnet(TINY), tmp_path, f"{FILE} is damaged")


def test_a_missing_shard_and_an_index_that_leaves_the_folder_are_refused(tmp_path):
    release(TINY, tmp_path, shard_size="20KB")
    index = tmp_path / f"{FILE}.index.json"
    places = json.loads(index.read_text())
    name, shard = next(iter(places["weight_map"].items()))
    shutil.move(tmp_path / shard, tmp_path / "elsewhere")
    refused(build_mst_controlnet(TINY), tmp_path, f"{shard} of {index.name} is missing")
    shutil.move(tmp_path / "elsewhere", tmp_path / shard)
    for outside in ("../other.safetensors", "weights.bin"):
        index.write_text(json.dumps({"weight_map": {**places["weight_map"], name: outside}}))
        refused(build_mst_controlnet(TINY), tmp_path, "not a safetensors file there")
    for broken in ("{", "{}", "[]", '{"weight_map": 3}'):
        index.write_text(broken)
        refused(build_mst_controlnet(TINY), tmp_path, "is not readable")
