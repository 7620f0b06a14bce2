import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformer3DModel
from torch import Tensor, nn

from avlit.models.backbones import LayerRun
from avlit.models.bypass import BypassBlock, BypassLTX2, bypass_trainable
from avlit.models.control_unit import Control, control_unit
from avlit.models.ltx2_backbone import Conditions, LatentGrid, audio_coords, ltx2_block, video_coords
from avlit.models.pretrained import load_backbone
from avlit.models.sizes import LTX2Config
from avlit.models.twin_wan import Velocities

TINY = LTX2Config(
    num_layers=5,
    num_heads=2,
    video_head_dim=12,
    audio_head_dim=8,
    video_channels=8,
    audio_channels=6,
    text_dim=20,
)
GRID = LatentGrid(fps=24.0)
EMBEDDED = LatentGrid(fps=12.0, temporal_factor=4, spatial_factor=8, audio_rate=62.5, audio_factor=1)
TIMES = torch.tensor([300.0, 700.0])
B, T, HEIGHT, WIDTH, L, P = 2, 3, 2, 4, 9, 4


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(*, images: int = 0, voices: int = 0) -> dict[str, Any]:
    return {
        "video_latents": noise(B, 8, images + T, HEIGHT, WIDTH, seed=1),
        "audio_latents": noise(B, voices + L, 6, seed=2),
        "video_timestep": TIMES,
        "audio_timestep": TIMES,
        "text": noise(B, 5, 20, seed=3),
        "grid": GRID,
    }


def controls(*, image: bool = False, voice: bool = False, **has: Tensor) -> Control:
    return control_unit(
        empty=noise(1, 8, T, HEIGHT, WIDTH, seed=4),
        silence=noise(1, L + P * voice, 6, seed=5),
        image=noise(B, 8, 1, HEIGHT, WIDTH, seed=6) if image else None,
        voice=noise(B, P, 6, seed=7) if voice else None,
        structure=noise(B, 8, T, HEIGHT, WIDTH, seed=8),
        **has,
    )


def built(config: LTX2Config = TINY, *, trained: bool = False) -> BypassLTX2:
    """A backbone with weights as after training (none is zero), a bypass, frozen as the recipe freezes it."""
    model = BypassLTX2(config)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.05)
    model.add_bypass()
    if trained:
        with torch.no_grad():
            for parameter in bypass_of(model).parameters():
                parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.05)
    return frozen(model, "bypass")


def frozen(model: BypassLTX2, which: Any) -> BypassLTX2:
    trained = set(bypass_trainable(model, which=which))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def bypass_of(model: BypassLTX2) -> Any:
    assert model.bypass is not None
    return model.bypass


def run(model: BypassLTX2, x: dict[str, Any], **changes: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return both(model(**{**x, **changes}))


def both(velocities: Velocities) -> tuple[Tensor, Tensor]:
    assert velocities.video is not None
    assert velocities.audio is not None
    return velocities.video, velocities.audio


def equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def differ(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> tuple[bool, bool]:
    video, audio = (bool((a - b).abs().max() > 1e-4) for a, b in zip(found, expected, strict=True))
    return video, audio


def stock(model: BypassLTX2, x: dict[str, Any], **changes: Any) -> tuple[Tensor, Tensor]:
    """The stock model on the same inputs; its own positions unless they are given."""
    video = x["video_latents"]
    frames, height, width = video.shape[2:]
    kwargs: dict[str, Any] = {
        "encoder_hidden_states": x["text"], "audio_encoder_hidden_states": x.get("audio_text", x["text"]),
        "encoder_attention_mask": x.get("text_mask"), "audio_encoder_attention_mask": x.get("text_mask"),
        "timestep": x["video_timestep"], "audio_timestep": x["audio_timestep"],
        "num_frames": frames, "height": height, "width": width, "fps": x["grid"].fps,
        "audio_num_frames": x["audio_latents"].shape[1],
    }  # fmt: skip
    with torch.no_grad():
        tokens, audio = model.backbone(
            video.flatten(2).transpose(1, 2), x["audio_latents"], return_dict=False, **{**kwargs, **changes}
        )
    return tokens.transpose(1, 2).reshape(video.shape), audio


# The stock model within.


def spread(x: dict[str, Any]) -> dict[str, Any]:
    """The same with a time for each token, the first frame and sound clean."""
    x["video_timestep"] = TIMES[:, None] * (torch.arange(T * HEIGHT * WIDTH) >= HEIGHT * WIDTH)
    x["audio_timestep"] = TIMES[:, None] * (torch.arange(L) > 1)
    return x


def masked(x: dict[str, Any]) -> dict[str, Any]:
    x["text_mask"] = torch.tensor([[True] * 5, [False, False, True, True, True]])  # padded on the left, as Gemma pads
    x["audio_text"] = noise(B, 5, 20, seed=9)
    return x


VARIANTS = pytest.mark.parametrize("change", [dict, spread, masked], ids=["plain", "a time a token", "masked text"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def cast(x: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    names = ("video_latents", "audio_latents", "text", "audio_text")
    return {name: value.to(dtype) if name in names else value for name, value in x.items()}


@VARIANTS
@DTYPES
def test_without_a_control_it_is_the_stock_model_bit_for_bit(dtype, change):
    model, x = built(trained=True).to(dtype), cast(change(inputs()), dtype)
    found = run(model, x)
    assert found[0].dtype == dtype
    assert equal(found, stock(model, x))
    if "text_mask" in x:
        assert differ(run(model, {**x, "text_mask": None}), found) == (True, True)


@VARIANTS
@DTYPES
def test_an_untrained_bypass_changes_no_bit(dtype, change):
    model, x = built().to(dtype), cast(change(inputs()), dtype)
    control = controls()
    control = replace(control, visual=control.visual.to(dtype), acoustic=control.acoustic.to(dtype))
    assert equal(run(model, x, control=control), stock(model, x))


def test_an_untrained_float32_bypass_beside_a_bfloat16_backbone_changes_no_bit_under_autocast():
    model, x = built(), inputs()
    model.backbone.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = run(model, x, control=controls()), stock(model, x)
    assert bypass_of(model)["video"].projector.weight.dtype == torch.float32
    assert equal(found, expected)


def test_references_in_front_are_tokens_of_the_stock_model_with_times_before_the_clip():
    model, x = built(), inputs(images=1, voices=P)
    coords = {
        "video_coords": video_coords(1 + T, HEIGHT, WIDTH, grid=GRID, num_references=1, device="cpu"),
        "audio_coords": audio_coords(P + L, grid=GRID, num_references=P, device="cpu"),
    }
    coords = {name: value.expand(B, -1, -1, -1) for name, value in coords.items()}
    found = run(model, x, control=controls(image=True, voice=True))
    assert equal(found, stock(model, x, **coords))
    assert differ(found, stock(model, x)) == (True, True)


def test_a_released_folder_becomes_the_backbone_and_then_the_bypass(tmp_path):
    release(tmp_path)
    with torch.device("meta"):
        model = BypassLTX2(TINY)
    report = load_backbone(model, tmp_path)
    assert len(report.loaded) == len(model.backbone.state_dict())
    assert report.new == report.unused == ()
    model.add_bypass()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    released: Any = LTX2VideoTransformer3DModel.from_pretrained(tmp_path / "transformer")
    model.backbone, kept = released, model.backbone
    expected = stock(model, inputs())
    model.backbone = kept
    assert equal(run(model, inputs(), control=controls()), expected)


def test_another_size_or_a_later_ltx_is_refused(tmp_path):
    release(tmp_path)
    model = BypassLTX2(replace(TINY, audio_head_dim=6))
    with pytest.raises(ValueError, match=r"another model's weights.*audio_attention_head_dim: expected 6, found 8"):
        load_backbone(model, tmp_path)
    path = tmp_path / "transformer" / "config.json"
    released = json.loads(path.read_text())
    for key, value in (("rope_type", "interleaved"), ("gated_attn", True), ("timestep_scale_multiplier", 1)):
        path.write_text(json.dumps({**released, key: value}))
        with pytest.raises(ValueError, match=f"{key}: expected .*, found {value}"):
            load_backbone(BypassLTX2(TINY), tmp_path)


def release(folder: Path) -> None:
    built().backbone.save_pretrained(folder / "transformer")


def test_positions_follow_the_grid_and_a_clips_neighbours_of_another_grid_do_not_matter():
    model, x = built(), inputs()
    first = run(model, x)
    assert differ(run(model, x, grid=EMBEDDED), first) == (True, True)
    assert equal(run(model, x), first)


# What the bypass does.


def test_a_bypass_block_is_one_stream_of_the_stock_block_without_attention_to_the_other():
    model, x = built(), inputs()
    seen: list[tuple[Any, ...]] = []
    backbone = model.backbone
    backbone.transformer_blocks[2].register_forward_pre_hook(
        lambda _, __, kwargs: seen.append((kwargs["hidden_states"], kwargs["audio_hidden_states"])), with_kwargs=True
    )
    conditions: list[Conditions] = []
    original = BypassBlock.forward

    def spy(block: BypassBlock, context: Tensor, condition: Conditions) -> tuple[Tensor, Tensor]:
        conditions.append(condition)
        return original(block, context, condition)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BypassBlock, "forward", spy)
        run(model, masked(x), control=controls())
    video, audio = conditions[:2]
    (h, ha), stock_block = seen[0], backbone.transformer_blocks[2]
    cut = stock_block.forward
    stock_block.forward = lambda **kwargs: cut(**kwargs, use_a2v_cross_attention=False, use_v2a_cross_attention=False)
    with torch.no_grad():
        expected = ltx2_block(stock_block, video, audio, h, ha)
        found = (
            bypass_of(model)["video"].blocks["2"](h, video)[0], bypass_of(model)["audio"].blocks["2"](ha, audio)[0]
        )  # fmt: skip
    assert equal(found, expected)


def test_scales_of_zero_are_the_stock_model_after_training_and_the_backbone_has_not_moved():
    model, x = built(), inputs()
    control, before = controls(), {name: t.clone() for name, t in model.state_dict().items()}
    expected = stock(model, x)
    train(model, x, control=control)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(bypass_trainable(model, which="bypass"))
    zero = torch.zeros(B)
    for scales in ({"visual_scale": 0.0, "acoustic_scale": 0.0}, {"visual_scale": zero, "acoustic_scale": zero}):
        assert equal(run(model, x, control=control, **scales), expected)
    assert differ(run(model, x, control=control), expected) == (True, True)


def train(model: BypassLTX2, x: dict[str, Any], *, control: Control, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, x, control=control).backward()
        optimizer.step()


def loss(model: BypassLTX2, x: dict[str, Any], **changes: Any) -> Tensor:
    video, audio = both(model(**{**x, **changes}))
    return (video - 1).square().mean() + (audio - 1).square().mean()


def test_each_modality_is_controlled_by_its_own_scale_and_tells_the_other_through_the_backbone():
    model, x = built(trained=True), inputs(images=1, voices=P)
    control = controls(image=True, voice=True)
    of = {scales: run(model, x, control=control, visual_scale=scales[0], acoustic_scale=scales[1])
          for scales in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))}  # fmt: skip
    # Attention between the streams carries a hint on: neither output is untouched by the other's control.
    assert differ(of[1.0, 0.0], of[0.0, 0.0]) == (True, True)
    assert differ(of[0.0, 1.0], of[0.0, 0.0]) == (True, True)
    other = replace(control, acoustic=control.acoustic + 1)
    assert equal(run(model, x, control=other, acoustic_scale=0.0), of[1.0, 0.0])
    # Without it, a control reaches its own modality alone, bit for bit.
    with torch.no_grad():
        for block in model.backbone.transformer_blocks:
            for attention in (block.audio_to_video_attn, block.video_to_audio_attn):
                for parameter in attention.to_out.parameters():
                    parameter.zero_()
    none, visual, acoustic = (
        run(model, x, control=control, visual_scale=visual_scale, acoustic_scale=acoustic_scale)
        for visual_scale, acoustic_scale in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))
    )
    assert differ(visual, none) == (True, False)
    assert torch.equal(visual[1], none[1])
    assert differ(acoustic, none) == (False, True)
    assert torch.equal(acoustic[0], none[0])


def test_each_clip_can_have_its_own_scales():
    model, x, control = built(trained=True), inputs(), controls()
    together = run(
        model, x, control=control, visual_scale=torch.tensor([0.0, 1.5]), acoustic_scale=torch.tensor([0.5, 1.0])
    )
    for clip, (visual, acoustic) in enumerate(((0.0, 0.5), (1.5, 1.0))):
        alone = run(model, x, control=control, visual_scale=visual, acoustic_scale=acoustic)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[clip], b[clip], rtol=1e-4, atol=1e-5)


def test_every_part_of_a_control_is_read():
    model, x = built(trained=True), inputs(images=1, voices=P)
    full = controls(image=True, voice=True)
    expected = run(model, x, control=full)
    for flag in ("has_image", "has_structure", "has_voice"):
        dropped = controls(image=True, voice=True, **{flag: torch.tensor([True, False])})
        found = run(model, x, control=dropped)
        assert all((a[0] - b[0]).abs().max() < 1e-5 for a, b in zip(found, expected, strict=True))
        assert differ((found[0][1:], found[1][1:]), (expected[0][1:], expected[1][1:])) == (True, True)
    mask_only = replace(full, visual=torch.cat((full.visual[:, :-1], 1 - full.visual[:, -1:]), dim=1))
    assert differ(run(model, x, control=mask_only), expected) == (True, True)


# Training.


def test_the_bypass_starts_as_a_copy_with_hints_of_zero_and_a_drawn_mask_column():
    model = built()
    for modality, own in (("video", ""), ("audio", "audio_")):
        stream = bypass_of(model)[modality]
        inherited = getattr(model.backbone, f"{own}proj_in")
        assert torch.equal(stream.projector.weight[:, :-1], inherited.weight)
        assert torch.equal(stream.projector.bias, inherited.bias)
        assert 0.005 < stream.projector.weight[:, -1].std() < 0.04
        assert list(stream.blocks) == ["0", "2", "4"]
        for layer, block in stream.blocks.items():
            source = model.backbone.transformer_blocks[int(layer)].state_dict()
            for name, tensor in block.state_dict().items():
                expected = torch.zeros_like(tensor) if name.startswith("hint.") else source[own + name]
                assert torch.equal(tensor, expected)
    with torch.no_grad():  # a copy: the backbone's weights are not its own
        bypass_of(model)["video"].projector.bias.add_(1)
        bypass_of(model)["video"].blocks["0"].attn1.to_q.weight.add_(1)
        bypass_of(model)["video"].blocks["0"].scale_shift_table.add_(1)
    backbone = model.backbone
    for theirs, ours in (
        (backbone.proj_in.bias, bypass_of(model)["video"].projector.bias),
        (backbone.transformer_blocks[0].attn1.to_q.weight, bypass_of(model)["video"].blocks["0"].attn1.to_q.weight),
        (backbone.transformer_blocks[0].scale_shift_table, bypass_of(model)["video"].blocks["0"].scale_shift_table),
    ):
        torch.testing.assert_close(ours, theirs + 1)


def test_weights_are_a_function_of_the_seed_and_the_backbone():
    first = BypassLTX2(TINY, seed=1)
    torch.randn(5)
    before = torch.get_rng_state()
    again, other = BypassLTX2(TINY, seed=1), BypassLTX2(TINY, seed=2)
    for model in (first, again):
        model.add_bypass(seed=1)
    other.backbone.load_state_dict(first.backbone.state_dict())
    other.add_bypass(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    expected, same, others = (model.state_dict() for model in (first, again, other))
    assert all(torch.equal(tensor, same[name]) for name, tensor in expected.items())
    changed = {name for name, tensor in expected.items() if not torch.equal(tensor, others[name])}
    assert changed == {"bypass.video.projector.weight", "bypass.audio.projector.weight"}


def gradients(model: BypassLTX2, x: dict[str, Any], **changes: Any) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss(model, x, **changes).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def reached(found: dict[str, Tensor | None]) -> set[str]:
    return {name for name, gradient in found.items() if gradient is not None and gradient.abs().max() > 0}


def test_hints_learn_first_and_then_all_of_the_bypass_and_never_the_backbone():
    x, control = inputs(images=1, voices=P), controls(image=True, voice=True)
    untrained = built()
    hints = {name for name in bypass_trainable(untrained, which="bypass") if ".hint." in name}
    assert reached(gradients(untrained, x, control=control)) == hints
    trained = built(trained=True)
    found = gradients(trained, x, control=control)
    assert reached(found) == set(bypass_trainable(trained, which="bypass"))
    assert all(gradient is None for name, gradient in found.items() if name.startswith("backbone."))


def test_a_bypass_block_reads_what_the_one_before_made_of_the_context():
    model, x = built(trained=True), inputs()
    expected = run(model, x, control=controls())
    for modality in ("video", "audio"):
        first = bypass_of(model)[modality].blocks["0"]
        with torch.no_grad():
            first.hint.weight.zero_()
            first.hint.bias.zero_()
    silent = run(model, x, control=controls())
    assert differ(silent, expected) == (True, True)
    for place, modality in enumerate(("video", "audio")):
        with torch.no_grad():
            bypass_of(model)[modality].blocks["0"].ff.net[2].bias.add_(1)
        assert differ(run(model, x, control=controls()), silent)[place]
        silent = run(model, x, control=controls())


def test_the_backbone_alone_can_be_trained_before_it_has_a_bypass():
    model = BypassLTX2(TINY)
    assert all(name.startswith("backbone.") for name in model.state_dict())
    found = gradients(model, inputs())
    assert all(velocity.abs().max() == 0 for velocity in run(model, inputs()))
    heads = {f"backbone.{own}proj_out.{kind}" for own in ("", "audio_") for kind in ("weight", "bias")}
    assert reached(found) == heads
    trained = built()
    trained.bypass = None
    trained.requires_grad_(True)
    assert reached(gradients(trained, inputs())) == set(bypass_trainable(model, which="backbone"))
    with pytest.raises(ValueError, match="trainable='bypass' for a model without one: call add_bypass first"):
        bypass_trainable(model, which="bypass")


def test_recomputed_layers_have_the_same_gradients():
    model, x = built(trained=True), inputs(images=1, voices=P)
    control = controls(image=True, voice=True)
    kept = gradients(model, x, control=control)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    bypass_of(model)["audio"].blocks["2"].ff.register_forward_hook(count)
    model.layer_run = LayerRun(recompute="blocks")
    recomputed = gradients(model, x, control=control)
    assert calls == 2
    for name, gradient in kept.items():
        if gradient is not None:
            torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=0)


def stored(model: nn.Module, run: Any) -> int:
    """Bytes of distinct storages that autograd keeps for the backward pass, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensor too, so that its address is not given to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(size for size, _ in kept.values())


def test_a_frozen_backbone_stores_nothing_before_the_first_hint_and_less_after_it():
    model, x = built(trained=True), inputs()
    outputs: dict[int, bool] = {}
    for layer, block in enumerate(model.backbone.transformer_blocks):
        block.register_forward_hook(
            lambda _, __, out, layer=layer: outputs.update({layer: out[0].requires_grad or out[1].requires_grad})
        )
    model(**x, control=controls())
    assert outputs == {0: False, 1: True, 2: True, 3: True, 4: True}
    assert stored(model, lambda: model(**x)) == 0

    with_bypass = stored(model, lambda: model(**x, control=controls()))
    frozen(model, "backbone")
    bypass_of(model).requires_grad_(True)  # as if both were trained
    together = stored(model, lambda: model(**x, control=controls()))
    assert with_bypass < 0.8 * together


def test_a_model_first_used_for_inference_can_train():
    model, x, control = built(trained=True), inputs(), controls()
    with torch.inference_mode():
        model(**x, control=control)
    assert reached(gradients(model, x, control=control)) == set(bypass_trainable(model, which="bypass"))


# Sizes.


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_paper_size_is_the_released_ltx2_with_a_bypass_beside_its_even_layers():
    with torch.device("meta"):
        model = BypassLTX2(LTX2Config())
        model.add_bypass()
        released = LTX2VideoTransformer3DModel(rope_type="split")
    state = {name: tensor.shape for name, tensor in model.state_dict().items()}
    of_backbone = {name: shape for name, shape in state.items() if name.startswith("backbone.")}
    assert of_backbone == {f"backbone.{name}": tensor.shape for name, tensor in released.state_dict().items()}
    ours, theirs = (
        {k: v for k, v in m.config.items() if k != "_use_default_values"} for m in (model.backbone, released)
    )
    assert ours == theirs
    assert count(model.backbone) == 18_876_174_592

    bypass = bypass_of(model)
    block = {name: t.numel() for name, t in released.transformer_blocks[0].state_dict().items()}
    video = ("attn1.", "attn2.", "ff.", "scale_shift_table")
    of_video = sum(size for name, size in block.items() if name.startswith(video))
    of_audio = sum(size for name, size in block.items() if name.startswith(tuple(f"audio_{v}" for v in video)))
    hints = sum(width * width + width for width in (4096, 2048))
    projectors = sum((128 + 1) * width + width for width in (4096, 2048))
    assert count(bypass) == 24 * (of_video + of_audio + hints) + projectors
    assert round(count(bypass) / 1e9, 2) == 8.56
    assert list(bypass["video"].blocks) == [str(layer) for layer in range(0, 48, 2)]
    assert not [name for name in state if name.startswith("bypass.") and "_to_" in name]
    assert set(bypass_trainable(model, which="bypass")) == {name for name in state if name.startswith("bypass.")}


def test_the_bypass_can_stand_beside_other_layers():
    model = BypassLTX2(replace(TINY, bypass_every=3))
    model.add_bypass()
    assert list(bypass_of(model)["audio"].blocks) == ["0", "3"]


# Mistakes.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_latents": torch.zeros(2, 6, 3, 2, 4)}, "video latents have 6 channels but model.video_channels=8"),
        ({"audio_latents": torch.zeros(2, 9, 5)}, "audio latents have 5 channels but model.audio_channels=6"),
        ({"video_timestep": torch.zeros(2, 3)}, r"video_timestep has shape \(2, 3\): must be \(2,\) or \(2, 24\)"),
        ({"audio_timestep": torch.zeros(1)}, r"audio_timestep has shape \(1,\): must be \(2,\) or \(2, 9\)"),
        (
            {"control": controls(image=True)},
            r"the visual control has shape \(2, 9, 4, 2, 4\), expected \(2, 9, 3, 2, 4",
        ),
        ({"control": controls(voice=True)}, r"the acoustic control has shape \(2, 13, 7\), expected \(2, 9, 7\)"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        run(built(), inputs(), **changes)


def test_a_control_needs_a_bypass():
    with pytest.raises(ValueError, match="a control for a model without a bypass: call add_bypass first"):
        run(BypassLTX2(TINY), inputs(), control=controls())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "model.num_layers=0: must be at least 1"),
        ({"bypass_every": 0}, "model.bypass_every=0: must be at least 1"),
        ({"audio_head_dim": 7}, "model.audio_head_dim=7: must be even for the rotary embedding"),
        ({"num_heads": 1, "video_head_dim": 4}, "at least 6 wide together"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BypassLTX2(replace(TINY, **changes))
