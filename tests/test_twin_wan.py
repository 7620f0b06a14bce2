import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F

from avlit.models import twin_block
from avlit.models.backbones import LayerRun
from avlit.models.joint_attention import Heads
from avlit.models.sizes import TwinWanConfig
from avlit.models.twin_wan import TwinWan, Velocities, load_released, twin_trainable

TINY = TwinWanConfig(
    num_layers=3,
    num_heads=2,
    head_dim=24,
    ffn_dim=64,
    freq_dim=16,
    text_dim=20,
    max_text_tokens=10,
    max_reference_tokens=6,
    video_channels=8,
    audio_channels=5,
    audio_kernel=3,
)
TIMES = torch.tensor([300.0, 700.0])


def inputs(*, batch: int = 2, frames: int = 3, tokens: int = 11) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(7)
    return {
        "video_latents": torch.randn(batch, TINY.video_channels, frames, 4, 6, generator=random),
        "audio_latents": torch.randn(batch, tokens, TINY.audio_channels, generator=random),
        "text": torch.randn(batch, TINY.max_text_tokens, TINY.text_dim, generator=random),
        "reference": torch.randn(batch, TINY.max_reference_tokens, TINY.audio_channels, generator=random),
        "video_timestep": TIMES[:batch].clone(),
        "audio_timestep": TIMES[:batch].clone(),
    }


def awake(config: TwinWanConfig = TINY) -> TwinWan:
    """A model in the middle of training: nothing is zero any more."""
    model = TwinWan(config)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)
    return model


def run(model: TwinWan, x: dict[str, Tensor], **changes: Any) -> Velocities:
    with torch.no_grad():
        return model(**{**x, **changes})


def audio_only(x: dict[str, Tensor], *, num_frames: float = 3) -> dict[str, Any]:
    return {**x, "video_latents": None, "video_timestep": None, "num_frames": num_frames}


def both(velocities: Velocities) -> tuple[Tensor, Tensor]:
    assert velocities.video is not None
    assert velocities.audio is not None
    return velocities.video, velocities.audio


# The stock model within.


def stock(model: TwinWan, x: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.backbone(x["video_latents"], x["video_timestep"], x["text"]).sample


def per_token(frame_times: Tensor, x: dict[str, Tensor]) -> Tensor:
    """Times of latent frames [B, T] -> of tokens [B, N], as Wan2.2's pipeline expands them."""
    _, _, _, height, width = x["video_latents"].shape
    return frame_times.repeat_interleave(height * width // 4, dim=1)


FIRST_FRAME_CLEAN = TIMES[:, None] * torch.tensor([0.0, 1.0, 1.0])


@pytest.mark.parametrize("per_clip", [True, False], ids=["a time a clip", "a time a token"])
def test_separate_video_is_the_stock_model_bit_for_bit(per_clip):
    model, x = TwinWan(TINY), inputs()
    if not per_clip:
        x["video_timestep"] = per_token(FIRST_FRAME_CLEAN, x)
    expected = stock(model, x)
    assert torch.equal(both(run(model, x, mode="separate"))[0], expected)
    alone = run(model, x, audio_latents=None, audio_timestep=None)
    assert alone.video is not None
    assert torch.equal(alone.video, expected)
    assert alone.audio is None


def test_separate_video_is_the_stock_model_bit_for_bit_under_autocast():
    model, x = TwinWan(TINY), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(both(run(model, x, mode="separate"))[0], stock(model, x))


def test_separate_video_is_the_stock_model_bit_for_bit_in_bfloat16_with_its_float32_parts(tmp_path):
    model = TwinWan(TINY)
    model.backbone.save_pretrained(tmp_path)
    model = model.bfloat16()
    model.backbone = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.backbone.named_parameters()}
    assert kinds["blocks.0.scale_shift_table"] == torch.float32
    assert kinds["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    x = {name: value.bfloat16() if "timestep" not in name else value for name, value in inputs().items()}
    assert torch.equal(both(run(model, x, mode="separate"))[0], stock(model, x))


def test_times_of_latent_frames_are_those_of_their_tokens():
    model, x = awake(), inputs()
    of_frames = run(model, x, video_timestep=FIRST_FRAME_CLEAN)
    of_tokens = run(model, x, video_timestep=per_token(FIRST_FRAME_CLEAN, x))
    for found, expected in zip(both(of_frames), both(of_tokens), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (both(of_frames)[0] - both(run(model, x))[0]).abs().max() > 1e-2


def test_equal_times_of_all_audio_tokens_are_one_time():
    model, x = awake(), inputs()
    spread = run(model, x, audio_timestep=TIMES[:, None].expand(2, 11))
    for found, expected in zip(both(spread), both(run(model, x)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    one_clean = TIMES[:, None] * (torch.arange(11) != 4)
    changed = (both(run(model, x, audio_timestep=one_clean, mode="separate"))[1] - both(run(model, x))[1]).abs()
    assert changed.amax((0, 2))[4] > 1e-2


def test_audio_twin_alone_is_a_stock_wan_of_its_weights():
    # With a frame for each token positions are whole, as the stock model's.
    model, x = awake(), inputs()
    twin = WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=24, in_channels=48, out_channels=5,
        text_dim=20, freq_dim=16, ffn_dim=64, num_layers=3,
    )  # fmt: skip
    weights = {name: tensor for name, tensor in model.audio.state_dict().items() if not name.startswith("stem")}
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert missing == ["patch_embedding.weight", "patch_embedding.bias"]
    assert not unexpected
    twin.patch_embedding = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    for references in model.audio_references:
        for parameter in references.get_submodule("to_v").parameters():
            nn.init.zeros_(parameter)
    with torch.no_grad():
        tokens = model.audio.embed(x["audio_latents"]).transpose(1, 2)[..., None, None]  # [B, D, L, 1, 1]
        expected: Any = twin(tokens, x["audio_timestep"], x["text"]).sample
    found = run(model, audio_only(x, num_frames=11)).audio
    assert found is not None
    assert found.abs().max() > 0.1
    torch.testing.assert_close(found, expected[..., 0, 0].transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_reference_attention_is_that_of_wan_for_images():
    config = replace(TINY, max_text_tokens=512)  # the stock model takes the last 512 tokens for text
    model, x = awake(config), inputs()
    x["text"] = torch.randn(2, 512, 20)
    stock_image: Any = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=8, out_channels=8, text_dim=20, freq_dim=16,
        ffn_dim=64, num_layers=3, added_kv_proj_dim=48,
    )  # fmt: skip
    weights = dict(model.backbone.state_dict())
    for layer, references in enumerate(model.video_references):
        for ours, theirs in (("to_k", "add_k_proj"), ("to_v", "add_v_proj"), ("norm_k", "norm_added_k")):
            for name, tensor in references.get_submodule(ours).state_dict().items():
                weights[f"blocks.{layer}.attn2.{theirs}.{name}"] = tensor
    stock_image.load_state_dict(weights)
    stock_image.condition_embedder.image_embedder = model.reference_embedding
    with torch.no_grad():
        expected: Any = stock_image(x["video_latents"], x["video_timestep"], x["text"], x["reference"]).sample
    video = run(model, x, audio_latents=None, audio_timestep=None).video
    assert video is not None
    torch.testing.assert_close(video, expected, rtol=1e-4, atol=1e-5)
    assert (video - stock(model, x)).abs().max() > 1e-2


# How the streams see each other.


def test_joint_streams_change_each_other():
    model, x = awake(), inputs()
    video, audio = both(run(model, x))
    assert (both(run(model, x, audio_latents=2 * x["audio_latents"]))[0] - video).abs().max() > 1e-2
    assert (both(run(model, x, video_latents=2 * x["video_latents"]))[1] - audio).abs().max() > 1e-2
    separate = both(run(model, x, mode="separate"))
    assert (separate[0] - video).abs().max() > 1e-2
    assert torch.equal(both(run(model, x, mode="separate", audio_latents=2 * x["audio_latents"]))[0], separate[0])
    assert torch.equal(both(run(model, x, mode="separate", video_latents=2 * x["video_latents"]))[1], separate[1])


def test_one_way_video_is_bit_identical_whatever_the_audio_is():
    model, x = awake(), inputs()
    x["video_timestep"] = torch.zeros(2)
    video, audio = both(run(model, x, mode="one-way"))
    for changes in (
        {"audio_latents": torch.randn(2, 11, 5)},
        {"audio_latents": torch.randn(2, 4, 5)},
        {"audio_latents": torch.full((2, 11, 5), 1e6)},
        {"audio_timestep": torch.tensor([0.0, 999.0])},
    ):
        assert torch.equal(both(run(model, x, mode="one-way", **changes))[0], video)
    assert torch.equal(both(run(model, x, mode="separate"))[0], video)
    assert (both(run(model, x, mode="one-way", video_latents=2 * x["video_latents"]))[1] - audio).abs().max() > 1e-2


def test_one_way_is_what_a_dense_mask_computes(monkeypatch):
    model, x = awake(), inputs()
    found = both(run(model, x, mode="one-way"))

    def dense(streams: list[Heads], *, mode: str) -> list[Tensor]:
        assert mode == "one-way"
        of_stream = torch.cat([torch.full((s.num_tokens,), i) for i, s in enumerate(streams)])
        mask = of_stream[:, None] >= of_stream
        query, key, value = (torch.cat([getattr(s, name) for s in streams], 2) for name in ("query", "key", "value"))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        return list(out.split([s.num_tokens for s in streams], dim=1))

    monkeypatch.setattr(twin_block, "joint_attention", dense)
    for ours, expected in zip(found, both(run(model, x, mode="one-way")), strict=True):
        assert (ours - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_each_clip_can_have_its_own_mode_and_time():
    model, x = awake(), inputs()
    together = both(run(model, x, mode=["one-way", "joint"]))
    for i, mode in enumerate(("one-way", "joint")):
        alone = both(run(model, {name: value[i : i + 1] for name, value in x.items()}, mode=mode))
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-4, atol=1e-5)
    assert (together[1][0] - both(run(model, x, mode="joint"))[1][0]).abs().max() > 1e-3


def test_audio_without_video_stands_where_it_stands_with_it():
    model, x = awake(), inputs()
    alone = run(model, audio_only(x))
    assert alone.video is None
    assert alone.audio is not None
    assert torch.equal(alone.audio, both(run(model, x, mode="separate"))[1])
    for num_frames in (9, 3.4):
        elsewhere = run(model, audio_only(x, num_frames=num_frames)).audio
        assert elsewhere is not None
        assert (elsewhere - alone.audio).abs().max() > 1e-3


# Conditions.


def test_a_reference_changes_nothing_before_training_and_something_after():
    x = inputs()
    untrained = TwinWan(TINY)
    with torch.no_grad():
        untrained.audio.proj_out.weight.normal_(0, 0.1)  # the head starts at zero and would hide any change
    for model, is_trained in ((untrained, False), (awake(), True)):
        with_it, without = both(run(model, x)), both(run(model, x, reference=None))
        for a, b in zip(with_it, without, strict=True):
            assert b.abs().max() > 0
            assert torch.equal(a, b) != is_trained


def test_no_reference_is_silence_and_a_short_one_is_followed_by_it():
    model, x = awake(), inputs()
    silence = torch.zeros_like(x["reference"])
    for short, padded in (
        (None, silence),
        (x["reference"][:, :2], torch.cat((x["reference"][:, :2], silence[:, 2:]), 1)),
    ):
        found, expected = both(run(model, x, reference=short)), both(run(model, x, reference=padded))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_short_prompt_is_padded_so_that_its_neighbours_do_not_matter():
    model, x = awake(), inputs()
    padded = F.pad(x["text"][:, :4], (0, 0, 0, 6))
    found, expected = both(run(model, x, text=x["text"][:, :4])), both(run(model, x, text=padded))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Training.


def gradients(model: TwinWan, x: dict[str, Any]) -> dict[str, Tensor | None]:
    model.zero_grad()
    out = model(**x)
    torch.stack([part.square().mean() for part in (out.video, out.audio) if part is not None]).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def reached(found: dict[str, Tensor | None]) -> set[str]:
    return {name for name, gradient in found.items() if gradient is not None and gradient.abs().max() > 0}


def test_audio_alone_trains_the_audio_twin_and_nothing_of_the_video():
    model = awake()
    found = gradients(model, audio_only(inputs()))
    embedder = {name for name in found if name.startswith("audio.condition_embedder.")}
    assert len(embedder) == 10
    assert reached(found) == set(twin_trainable(model, which="audio")) | embedder
    assert all(found[name] is None for name in found if name.startswith(("backbone.", "video_references.")))


@pytest.mark.parametrize("mode", ["joint", ["one-way", "joint"]])
def test_both_streams_together_train_everything(mode):
    model = awake()
    assert reached(gradients(model, {**inputs(), "mode": mode})) == set(twin_trainable(model, which="all"))


def test_an_untrained_model_can_start_to_learn_its_zeros():
    model = TwinWan(TINY)
    assert both(run(model, inputs()))[1].abs().max() == 0
    found = model(**inputs())
    (found.audio - 1).square().mean().backward()
    assert model.audio.proj_out.weight.grad.abs().max() > 0
    (model(**inputs()).video - 1).square().mean().backward()
    found = {name: p.grad for name, p in model.video_references.named_parameters() if ".to_v." in name}
    assert len(reached(found)) == 2 * TINY.num_layers


@pytest.mark.parametrize("mode", ["joint", "one-way"])
def test_recomputed_blocks_have_the_same_gradients(mode):
    model, x = awake(), {**inputs(), "mode": mode}
    kept = gradients(model, x)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.audio.blocks[0].ffn.register_forward_hook(count)
    model.layer_run = LayerRun(recompute="blocks")
    recomputed = gradients(model, x)
    assert calls == 2
    assert kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=0)


def test_a_model_first_used_for_inference_can_train():
    model = awake()
    with torch.inference_mode():
        model(**inputs())
    assert len(reached(gradients(model, inputs()))) == len(list(model.parameters()))


def test_stage_one_leaves_video_and_text_alone():
    model = TwinWan(TINY)
    names = twin_trainable(model, which="audio")
    assert not [name for name in names if name.startswith(("backbone.", "video_references."))]
    assert not [name for name in names if "condition_embedder" in name]
    for part in ("stem.0.weight", "blocks.2.attn1.to_q.weight", "blocks.0.ffn.net.2.bias", "proj_out.weight"):
        assert f"audio.{part}" in names
    assert "audio_references.1.to_v.weight" in names
    with pytest.raises(ValueError, match="trainable='video': must be one of audio, all"):
        twin_trainable(model, which="video")  # pyright: ignore[reportArgumentType]


# Sizes, weights and the released folder.


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_paper_size_is_wan_ti2v_5b_with_a_twin_of_its_blocks():
    with torch.device("meta"):
        model = TwinWan(TwinWanConfig())
        released = WanTransformer3DModel(
            num_attention_heads=24, in_channels=48, out_channels=48, ffn_dim=14336, num_layers=30
        )
    state = {name: tensor.shape for name, tensor in model.state_dict().items()}
    of_video = {name: shape for name, shape in state.items() if name.startswith("backbone.")}
    assert of_video == {f"backbone.{name}": tensor.shape for name, tensor in released.state_dict().items()}
    assert count(model.backbone) == 4_999_787_712

    shared = re.compile(r"(blocks|condition_embedder|scale_shift_table)\b")
    of_audio = {name.removeprefix("audio."): s for name, s in state.items() if name.startswith("audio.")}
    twins = {name.removeprefix("backbone."): s for name, s in of_video.items()}
    assert {n: s for n, s in of_audio.items() if shared.match(n)} == {n: s for n, s in twins.items() if shared.match(n)}
    ends = {n: tuple(s) for n, s in of_audio.items() if not shared.match(n)}
    assert ends == {
        "stem.0.weight": (3072, 40, 7), "stem.0.bias": (3072,), "stem.2.weight": (3072, 3072, 7),
        "stem.2.bias": (3072,), "proj_out.weight": (40, 3072), "proj_out.bias": (40,),
    }  # fmt: skip
    # Keys and values of the reference with their norm, in every block of both twins.
    references = 2 * 30 * (2 * (3072 * 3072 + 3072) + 3072)
    assert count(model.video_references) + count(model.audio_references) == references
    assert 10.0e9 < count(model) < 11.5e9
    assert round(count(model) / 1e9, 2) == 11.20


def test_weights_are_a_function_of_the_seed():
    first = TwinWan(TINY, seed=1)
    torch.randn(5)
    again, other = TwinWan(TINY, seed=1), TwinWan(TINY, seed=2)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.audio.stem[0].weight, other.audio.stem[0].weight)
    assert not torch.equal(first.backbone.blocks[0].ffn.net[2].weight, other.backbone.blocks[0].ffn.net[2].weight)
    other.draw_audio(seed=1)
    assert torch.equal(first.audio.stem[0].weight, other.audio.stem[0].weight)
    before = torch.get_rng_state()
    TwinWan(TINY)
    assert torch.equal(torch.get_rng_state(), before)


def release(folder: Path, config: TwinWanConfig = TINY, *, shard_size: str = "1GB") -> dict[str, Tensor]:
    """A released folder with weights of its own, as diffusers writes it; returns those weights."""
    released: Any = awake(config).backbone
    released.save_pretrained(folder / "transformer", max_shard_size=shard_size)
    return released.state_dict()


@pytest.mark.parametrize("shard_size", ["1GB", "50KB"], ids=["single", "sharded"])
def test_a_released_folder_fills_the_video_twin_and_the_audio_twins_embedders(tmp_path, shard_size):
    weights = release(tmp_path, shard_size=shard_size)
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (shard_size != "1GB")
    model, before = TwinWan(TINY), TwinWan(TINY).state_dict()
    report = load_released(model, tmp_path)
    state = model.state_dict()
    expected = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    expected |= {f"audio.{name}": t for name, t in weights.items() if name.startswith("condition_embedder.")}
    assert set(report.loaded) == set(expected)
    assert set(report.new) == state.keys() - expected.keys()
    assert report.unused == ()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(state[name], before[name]) for name in report.new)
    with torch.no_grad():  # a copy: training one leaves the other
        model.backbone.condition_embedder.time_proj.bias.add_(1)
    name = "audio.condition_embedder.time_proj.bias"
    assert torch.equal(model.state_dict()[name], expected[name])


def test_a_video_twin_built_on_the_meta_device_loads_and_runs(tmp_path):
    release(tmp_path)
    ordinary = TwinWan(TINY, seed=4)
    load_released(ordinary, tmp_path)
    with torch.device("meta"):
        model = TwinWan(TINY, seed=4)
    with pytest.raises(ValueError, match=r"the audio twin is on the meta device.*call draw_audio first"):
        load_released(model, tmp_path)
    model.draw_audio(seed=4)
    load_released(model, tmp_path)
    # The rotary buffers too, which are in no released file.
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    x = inputs()
    for a, b in zip(both(run(model, x)), both(run(ordinary, x)), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(both(run(model, x, mode="separate"))[0], stock(model, x))


def test_another_models_folder_is_refused_and_changes_nothing(tmp_path):
    release(tmp_path, replace(TINY, ffn_dim=96))
    model, before = TwinWan(TINY), TwinWan(TINY).state_dict()
    with pytest.raises(ValueError, match=r"another model's weights.*ffn_dim: expected 64, found 96"):
        load_released(model, tmp_path)
    release(tmp_path)
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_kv_proj_dim": 48}))
    with pytest.raises(ValueError, match="added_kv_proj_dim: expected None, found 48"):
        load_released(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Mistakes.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_latents": None, "audio_latents": None}, "neither video_latents nor audio_latents"),
        ({"video_timestep": None}, "video_latents and video_timestep go together"),
        ({"audio_latents": None}, "audio_latents and audio_timestep go together"),
        ({"video_latents": None, "video_timestep": None}, "num_frames=None: give it for sound without video"),
        ({"num_frames": 3}, "num_frames=3: give it for sound without video, and only then"),
        ({"audio_latents": None, "audio_timestep": None, "mode": "one-way"}, "mode='one-way': a single stream"),
        ({"mode": "blind"}, "mode='blind': must be one of joint, one-way, separate"),
        ({"mode": ["joint"]}, "1 modes for 2 clips"),
        ({"video_latents": torch.zeros(2, 6, 3, 4, 6)}, "6 channels but model.video_channels=8"),
        ({"video_latents": torch.zeros(2, 8, 3, 4, 5)}, "4x5: must be multiples of model.patch_size=2"),
        ({"audio_latents": torch.zeros(2, 11, 6)}, "6 channels but model.audio_channels=5"),
        ({"video_timestep": torch.zeros(2, 4)}, r"video_timestep has shape \(2, 4\) for 18 tokens"),
        ({"audio_timestep": torch.zeros(2, 3)}, r"audio_timestep has shape \(2, 3\) for 11 tokens"),
        ({"text": torch.zeros(2, 11, 20)}, "text has 11 tokens but model.max_text_tokens=10"),
        ({"reference": torch.zeros(2, 7, 5)}, "reference has 7 tokens but model.max_reference_tokens=6"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TwinWan(TINY)(**{**inputs(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "model.num_layers=0: must be at least 1"),
        ({"head_dim": 25}, "model.head_dim=25: must be even"),
        ({"freq_dim": 15}, "model.freq_dim=15: must be even"),
        ({"audio_kernel": 4}, "model.audio_kernel=4: must be odd"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TwinWan(replace(TINY, **changes))
