import copy
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F

from avlit.models.backbones import LayerRun, cogvideox_positions, cogvideox_rotary
from avlit.models.mst_controlnet import MSTControlNet, build_mst_controlnet, mtv_trainable
from avlit.models.sizes import MSTControlNetConfig, wan_14b
from avlit.models.track_encoder import ControlTokens, IntervalEncoder

TINY = MSTControlNetConfig(
    num_layers=3,
    num_heads=2,
    head_dim=32,
    in_channels=12,
    out_channels=6,
    text_dim=20,
    max_text_tokens=10,
    time_embed_dim=24,
    sample_height=8,
    sample_width=8,
    sample_frames=9,
    wan_ffn_dim=96,
    wan_freq_dim=32,
    audio_layers=2,
    audio_dim=6,
    audio_hidden=16,
    audio_tokens=4,
    control_dim=24,
    interaction_heads=4,
    num_interaction_blocks=2,
)
TINY_WAN = replace(TINY, variant="wan", in_channels=6)
BOTH = pytest.mark.parametrize("config", [TINY, TINY_WAN], ids=["cogvideox", "wan"])


def inputs(config: MSTControlNetConfig, *, batch: int = 2, frames: int = 3, size: tuple[int, int] = (8, 8)) -> Any:
    random = torch.Generator().manual_seed(7)
    tracks = {
        name: torch.randn(batch, 4 * frames - 3, config.audio_layers, config.audio_dim, generator=random)
        for name in ("speech", "effects", "music", *(("speech_second",) if config.second_speaker else ()))
    }
    return {
        "noisy_latents": torch.randn(batch, config.out_channels, frames, *size, generator=random),
        "timestep": torch.tensor([30, 801, 405, 999])[:batch],
        "text": torch.randn(batch, config.max_text_tokens, config.text_dim, generator=random),
        **tracks,
    }


def awake(config: MSTControlNetConfig) -> MSTControlNet:
    """A model in the middle of training: nothing is zero any more."""
    model = build_mst_controlnet(config)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("injections", "control.speaker")):
                parameter.normal_(0, 0.2, generator=random)
    return model.eval()


def stock(model: MSTControlNet, x: Any, **changes: Any) -> Tensor:
    """The stock diffusers forward on the same inputs."""
    x = {**x, **changes}
    latents = x["noisy_latents"]
    if model.config.variant == "wan":
        return model.backbone(latents, x["timestep"], x["text"]).sample
    _, _, frames, height, width = latents.shape
    rotary = cogvideox_rotary(model.backbone, frames, height, width, latents.device)
    latents = torch.cat((latents, torch.zeros_like(latents)), dim=1).transpose(1, 2)
    return model.backbone(latents, x["text"], x["timestep"], image_rotary_emb=rotary).sample.transpose(1, 2)


ABLATIONS = [
    {},
    {"second_speaker": True},
    {"separate_extraction": False},
    {"separate_injection": False, "second_speaker": True},
    {"separate_extraction": False, "separate_injection": False},
    {"num_interaction_blocks": 0},
    {"conv_groups": 4},
]


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
@BOTH
def test_untrained_control_leaves_the_stock_backbone_bit_identical(config, changes):
    config = replace(config, **changes)
    model, x = build_mst_controlnet(config), inputs(config)
    with torch.no_grad():
        assert torch.equal(model(**x), stock(model, x))


@BOTH
def test_untrained_control_leaves_the_backbone_bit_identical_under_autocast(config):
    model, x = build_mst_controlnet(config), inputs(config)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(**x), stock(model, x))


def test_untrained_control_leaves_a_bfloat16_backbone_bit_identical():
    model = build_mst_controlnet(TINY).bfloat16()
    x = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs(TINY).items()}
    with torch.no_grad():
        assert torch.equal(model(**x), stock(model, x))


@BOTH
def test_awake_control_changes_the_output(config):
    model, x = awake(config), inputs(config)
    with torch.no_grad():
        assert (model(**x) - stock(model, x)).abs().mean() > 0.01


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def paper_control_parameters(config: MSTControlNetConfig) -> int:
    """Counted from the paper's text and code, not from the modules."""
    width, tokens, hidden, inner = (config.control_dim, config.audio_tokens, config.audio_hidden, config.inner_dim)
    seen = (2 * config.audio_window + 1) * config.audio_layers * config.audio_dim
    encoder = linear(seen, hidden) + linear(hidden, hidden) + linear(hidden, tokens * width) + 2 * width
    encoder += tokens * width * (tokens * width // config.conv_groups) * 2 + tokens * width
    block = linear(width, 3 * width) + linear(width, width) + linear(width, 4 * width) + linear(4 * width, width)
    block += linear(config.temb_dim, 12 * width) + 3 * 2 * width
    attention = 2 * linear(inner, inner) + linear(width, 2 * inner) + 2 * inner
    layer = 2 * attention + linear(width, 2 * inner)
    return 3 * encoder + config.num_interaction_blocks * block + config.num_layers * layer


def test_paper_size_is_cogvideox_5b_i2v_with_the_papers_control():
    with torch.device("meta"):
        model = build_mst_controlnet(MSTControlNetConfig())
        released = CogVideoXTransformer3DModel(
            num_attention_heads=48,
            in_channels=32,
            num_layers=42,
            use_rotary_positional_embeddings=True,
            use_learned_positional_embeddings=True,
        )
    assert sum(p.numel() for p in model.backbone.parameters()) == 5_570_479_680
    ours = {name: tensor.shape for name, tensor in model.state_dict().items() if name.startswith("backbone.")}
    assert ours == {f"backbone.{name}": tensor.shape for name, tensor in released.state_dict().items()}
    control = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("backbone."))
    assert control == paper_control_parameters(MSTControlNetConfig())
    assert round(control / 1e9, 2) == 5.96


def test_grouped_convolution_takes_most_of_the_control_away():
    with torch.device("meta"):
        model = build_mst_controlnet(MSTControlNetConfig(conv_groups=32, num_layers=1))
    encoder = model.get_submodule("control.encoders.speech.halve")
    assert sum(p.numel() for p in encoder.parameters()) == 32 * 768 * 768 * 2 + 32 * 768
    control = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("backbone."))
    assert control == paper_control_parameters(MSTControlNetConfig(conv_groups=32, num_layers=1))


def test_wan_size_is_wan_14b():
    with torch.device("meta"):
        model = build_mst_controlnet(wan_14b())
        released = WanTransformer3DModel()
    assert sum(p.numel() for p in model.backbone.parameters()) == 14_288_491_584
    assert model.backbone.state_dict().keys() == released.state_dict().keys()
    control = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("backbone."))
    assert control == paper_control_parameters(wan_14b())


def reference_attention(cross: Any, norms: Any, video: Tensor, tokens: Tensor, angles: Tensor, *, wan: bool) -> Tensor:
    """Eq. 2 for one interval of one sample, a head at a time, rotation as complex numbers."""
    heads = norms.heads
    normed = (video - video.mean(-1, keepdim=True)) / (video.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    query = (normed * cross.norm.weight + cross.norm.bias) @ cross.to_q.weight.T + cross.to_q.bias
    key_value = tokens @ cross.to_kv.weight.T + cross.to_kv.bias
    key, value = key_value[:, : video.shape[-1]], key_value[:, video.shape[-1] :]
    if wan:
        query, key = norms.norm_q(query), norms.norm_k(key)
    out = []
    for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
        if not wan:
            q, k = norms.norm_q(q), norms.norm_k(k)
        turned = torch.view_as_complex(q.reshape(len(q), -1, 2).contiguous()) * torch.polar(
            torch.ones_like(angles), angles
        )
        q = torch.view_as_real(turned).flatten(1)
        out.append(((q @ k.T) / math.sqrt(q.shape[-1])).softmax(-1) @ v)
    return torch.cat(out, -1) @ cross.to_out.weight.T + cross.to_out.bias


def spatial_angles(config: MSTControlNetConfig, height: int, width: int) -> Tensor:
    """Angles [S, head / 2] of the first frame's tokens: the temporal part stands at zero."""
    if config.variant == "wan":
        side = 2 * (config.head_dim // 6)
        parts = (config.head_dim - 2 * side, side, side)
    else:
        parts = (config.head_dim // 4, config.head_dim // 8 * 3, config.head_dim // 8 * 3)
    rows = []
    for y in range(height):
        for x in range(width):
            frequencies = [10000.0 ** (-torch.arange(0, part, 2) / part) for part in parts]
            rows.append(torch.cat([p * f for p, f in zip((0, y, x), frequencies, strict=True)]))
    return torch.stack(rows)


@BOTH
def test_injection_is_equations_2_and_3_for_each_sample_and_interval(config):
    model = awake(config)
    random = torch.Generator().manual_seed(5)
    batch, frames, space, tokens = 2, 3, 16, config.audio_tokens
    video = torch.randn(batch, frames * space, config.inner_dim, generator=random)
    speech, effects = (torch.randn(batch, frames, tokens, config.control_dim, generator=random) for _ in range(2))
    style = torch.randn(batch, config.control_dim, generator=random)
    injection: Any = model.injections[1]
    attention = (model.backbone.blocks if config.variant == "wan" else model.backbone.transformer_blocks)[1].attn1
    with torch.no_grad():
        for norm in (attention.norm_q, attention.norm_k):
            norm.weight.normal_(1, 0.3, generator=random)
    rotary = tuple(part[:space] for part in model._rotary(frames, 8, 8, video.device))
    control = ControlTokens({"speech": speech.flatten(0, 1), "effects": effects.flatten(0, 1)}, style)
    with torch.no_grad():
        out = injection(video, control, attention, rotary)

    angles, wan = spatial_angles(config, 4, 4), config.variant == "wan"
    for b in range(batch):
        gamma, beta = (style[b] @ injection.style.weight.T + injection.style.bias).chunk(2)
        for t in range(frames):
            h = video[b, t * space : (t + 1) * space]
            for name, track in (("speech", speech), ("effects", effects)):
                # Both read the same hidden state, that before any injection.
                update = reference_attention(
                    injection.cross[name],
                    attention,
                    video[b, t * space : (t + 1) * space],
                    track[b, t],
                    angles,
                    wan=wan,
                )
                h = h + update
            expected = h * (gamma + 1) + beta
            torch.testing.assert_close(out[b, t * space : (t + 1) * space], expected, rtol=1e-4, atol=1e-4)


def test_speech_of_an_interval_reaches_only_its_latent_frame_through_injection():
    model = awake(TINY)
    speech = torch.randn(2 * 3, 4, TINY.control_dim, requires_grad=True)
    control = ControlTokens(
        {"speech": speech, "effects": torch.randn(2 * 3, 4, TINY.control_dim)}, torch.randn(2, TINY.control_dim)
    )
    rotary = tuple(part[:16] for part in model._rotary(3, 8, 8, speech.device))
    video = torch.randn(2, 48, TINY.inner_dim)
    out = model.injections[0](video, control, model.backbone.transformer_blocks[0].attn1, rotary)
    (gradient,) = torch.autograd.grad(out[1, 16:32].square().sum(), speech)  # sample 1, latent frame 1
    assert gradient.abs().amax((1, 2)).gt(0).tolist() == [False] * 4 + [True, False]


@pytest.mark.parametrize("frames", [1, 5, 9, 25, 49])
def test_a_sound_in_one_frame_reaches_the_intervals_whose_window_holds_it(frames):
    encoder = IntervalEncoder(TINY).double()
    silence = torch.zeros(frames, frames, TINY.audio_layers, TINY.audio_dim, dtype=torch.float64)
    impulses = silence.clone()
    impulses[range(frames), range(frames)] = 5.0
    with torch.no_grad():
        changed = (encoder(impulses) - encoder(silence)).abs().amax((2, 3)) > 1e-9  # [frame, interval]
    assert changed.shape == (frames, (frames - 1) // 4 + 1)
    for frame in range(frames):
        for interval in range(changed.shape[1]):
            first, last = (0, 0) if interval == 0 else (4 * interval - 3, 4 * interval)
            assert changed[frame, interval] == (first - 2 <= frame <= last + 2)


def test_track_features_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"24 frames: must be 4n \+ 1"):
        IntervalEncoder(TINY)(torch.zeros(1, 24, TINY.audio_layers, TINY.audio_dim))


@BOTH
def test_each_sample_has_its_own_time_in_a_batch(config):
    config = replace(config, second_speaker=True)
    model, x = awake(config), inputs(config)
    with torch.no_grad():
        together = model(**x)
        apart = [model(**{name: value[i : i + 1] for name, value in x.items()}) for i in range(2)]
        same_time = model(**{**x, "timestep": x["timestep"][:1].expand(2)})
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)
    assert (together[1] - same_time[1]).abs().max() > 1e-2


@BOTH
def test_interaction_blocks_use_the_time_of_each_sample(config):
    model, x = awake(config), inputs(config)
    temb = torch.randn(2, config.temb_dim, generator=torch.Generator().manual_seed(2))
    tracks = {name: torch.cat([x[name][:1]] * 2) for name in ("speech", "effects", "music")}
    with torch.no_grad():
        both = model.control(**tracks, speech_second=None, temb=temb).interval["speech"].unflatten(0, (2, 3))
    assert (both[0] - both[1]).abs().max() > 1e-2


@BOTH
def test_an_empty_keyframe_mask_is_no_mask(config):
    model, x = awake(config), inputs(config)
    with torch.no_grad():
        assert torch.equal(model(**x, keyframe_mask=torch.zeros(2, 3, dtype=torch.bool)), model(**x))


@BOTH
def test_a_full_keyframe_mask_at_time_zero_is_no_mask(config):
    model, x = awake(config), {**inputs(config), "timestep": torch.zeros(2, dtype=torch.int64)}
    with torch.no_grad():
        masked = model(**x, keyframe_mask=torch.ones(2, 3, dtype=torch.bool))
        torch.testing.assert_close(masked, model(**x), rtol=1e-5, atol=1e-5)


def test_keyframes_take_time_zero_in_the_video_modulation_only():
    from avlit.models.backbones import cogvideox_norm

    model = awake(TINY)
    norm = model.backbone.transformer_blocks[0].norm1
    video, text = torch.randn(2, 48, 64), torch.randn(2, 10, 64)
    temb, clean = torch.randn(2, 24), torch.randn(1, 24)
    mask = torch.tensor([[True, False, False], [False, True, True]])
    with torch.no_grad():
        out, out_text, gate, text_gate = cogvideox_norm(norm, video, text, temb, clean, mask)
        at_step, at_clean = norm(video, text, temb), norm(video, text, clean.expand(2, -1))
    of_frame = mask.repeat_interleave(16, dim=1)[..., None]
    torch.testing.assert_close(out, torch.where(of_frame, at_clean[0], at_step[0]))
    torch.testing.assert_close(gate, torch.where(mask[..., None, None], at_clean[2][:, None], at_step[2][:, None]))
    torch.testing.assert_close(out_text, at_step[1])
    torch.testing.assert_close(text_gate, at_step[3])


def test_keyframes_of_wan_are_its_own_timesteps_for_each_token():
    model, x = build_mst_controlnet(TINY_WAN), inputs(TINY_WAN)
    mask = torch.tensor([[True, False, False], [False, True, True]])
    timestep = (x["timestep"][:, None] * ~mask).repeat_interleave(16, dim=1)
    with torch.no_grad():
        out = model(**x, keyframe_mask=mask)
        torch.testing.assert_close(out, stock(model, x, timestep=timestep), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("frames", "size"), [(1, (8, 8)), (2, (4, 8)), (3, (12, 6)), (5, (8, 8)), (4, (2, 10))])
@BOTH
def test_other_shapes_run(config, frames, size):
    model, x = awake(config), inputs(config, frames=frames, size=size)
    with torch.no_grad():
        out = model(**x)
    assert out.shape == x["noisy_latents"].shape
    assert out.isfinite().all()


@pytest.mark.parametrize("size", [(8, 8), (4, 8), (12, 6), (2, 10), (16, 8)])
def test_rotary_of_another_size_spans_the_grid_that_the_pipeline_spans(size):
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    backbone = build_mst_controlnet(replace(TINY, sample_height=12, sample_width=18)).backbone
    grid = (size[0] // 2, size[1] // 2)
    crop = get_resize_crop_region_for_grid(grid, 18 // 2, 12 // 2)
    expected = get_3d_rotary_pos_embed(TINY.head_dim, crop, grid, 3)
    found = cogvideox_rotary(backbone, 3, size[0], size[1], torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_position_table_is_exact_at_its_size_and_its_first_frames_below():
    backbone = build_mst_controlnet(TINY).backbone
    table = backbone.patch_embed.pos_embedding
    for frames in (1, 2, 3):
        text, video = cogvideox_positions(backbone, frames, 8, 8)
        assert torch.equal(torch.cat((text, video), dim=1), table[:, : 10 + 16 * frames])


def test_resized_position_table_keeps_the_order_of_frame_height_and_width():
    backbone = build_mst_controlnet(TINY).backbone
    t, y, x = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), torch.arange(4.0), indexing="ij")
    backbone.patch_embed.pos_embedding[0, 10:, :3] = torch.stack((t, y, x), -1).flatten(0, 2)
    video = cogvideox_positions(backbone, 2, 16, 4)[1][0].unflatten(0, (2, 8, 2))
    assert video[:, 0, 0, 0].tolist() == [0, 1]
    assert torch.allclose(video[0, 1:-1, 0, 1].diff(), torch.tensor(0.5))  # twice the rows, half the step
    assert torch.allclose(video[0, 0, :, 2], torch.tensor([0.5, 2.5]))  # half the columns, their means


@BOTH
def test_a_short_prompt_is_padded_so_that_its_neighbours_do_not_matter(config):
    model, x = awake(config), inputs(config)
    padded = {**x, "text": F.pad(x["text"][:, :4], (0, 0, 0, 6))}
    with torch.no_grad():
        assert torch.equal(model(**{**x, "text": x["text"][:, :4]}), model(**padded))


def test_no_second_speaker_is_a_silent_one():
    config = replace(TINY, second_speaker=True)
    model, x = awake(config), inputs(config)
    with torch.no_grad():
        heard = model(**x)
        silent = model(**{**x, "speech_second": torch.zeros_like(x["speech"])})
        assert torch.equal(model(**{**x, "speech_second": None}), silent)
        swapped = model(**{**x, "speech": x["speech_second"], "speech_second": x["speech"]})
    assert (heard - silent).abs().max() > 1e-2
    assert (heard - swapped).abs().max() > 1e-2  # the two speakers are told apart


def test_weights_of_a_stage_with_one_speaker_fit_one_with_two():
    one, two = (build_mst_controlnet(replace(TINY, second_speaker=second)) for second in (False, True))
    missing, unexpected = two.load_state_dict(one.state_dict(), strict=False)
    assert not unexpected
    assert all("speech_second" in name or name == "control.speaker_embedding" for name in missing)


def test_without_separate_extraction_music_joins_the_interval_stream():
    model = build_mst_controlnet(replace(TINY, separate_extraction=False))
    assert all(injection.style is None and "music" in injection.cross for injection in model.injections)  # pyright: ignore
    assert "music" in model.control.blocks[0].modulation  # pyright: ignore


def test_without_separate_injection_one_attention_reads_all_tracks():
    config = replace(TINY, separate_injection=False)
    model, x = awake(config), inputs(config)
    tracks = {name: x[name] for name in ("speech", "effects", "music")}
    control = model.control(**tracks, speech_second=None, temb=torch.randn(2, 24))
    assert {name: tuple(tokens.shape) for name, tokens in control.interval.items()} == {"merged": (6, 12, 24)}
    assert control.style is None


@pytest.mark.parametrize("changes", ABLATIONS[:5], ids=str)
@BOTH
def test_every_new_parameter_learns_from_the_second_step(config, changes):
    config = replace(config, **changes)
    model, x = build_mst_controlnet(config), inputs(config)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**x).square().mean().backward()
        optimizer.step()
    asleep = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not asleep


@BOTH
@pytest.mark.parametrize("recompute", ["blocks", "selective"])
def test_activation_checkpointing_changes_no_number(config, recompute):
    plain, x = awake(config), inputs(config)
    frugal = copy.deepcopy(plain)
    frugal.layer_run = LayerRun(recompute=recompute)
    mask = torch.tensor([[True, False, False], [False, False, True]])
    for model in (plain, frugal):
        model(**x, keyframe_mask=mask).square().mean().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), frugal.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad), name


def test_trainable_sets_are_the_papers():
    model = build_mst_controlnet(TINY)
    control = set(mtv_trainable(model, which="control"))
    paper = set(mtv_trainable(model, which="paper"))
    assert set(mtv_trainable(model, which="all")) == {name for name, _ in model.named_parameters()}
    assert control == {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    per_block = {f"attn1.{part}.{kind}" for part in ("to_q", "to_k", "to_v", "to_out.0") for kind in ("weight", "bias")}
    per_block |= {"norm2.norm.weight", "norm2.norm.bias"}
    expected = {f"backbone.transformer_blocks.{i}.{name}" for i in range(3) for name in per_block}
    assert paper - control == expected
    with pytest.raises(ValueError, match=r"trainable='most'.*paper, control, all"):
        mtv_trainable(model, which="most")  # pyright: ignore[reportArgumentType]


def test_weights_are_a_function_of_the_seed_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    first = build_mst_controlnet(TINY, seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, other = (build_mst_controlnet(TINY, seed=seed).state_dict() for seed in (4, 5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "injections.0.cross.speech.to_q.weight"
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noisy_latents": torch.zeros(2, 4, 3, 8, 8)}, "4 channels but model.out_channels=6"),
        ({"noisy_latents": torch.zeros(2, 6, 3, 7, 8)}, "7x8: must be multiples of model.patch_size=2"),
        ({"text": torch.zeros(2, 11, 20)}, "11 tokens but model.max_text_tokens=10"),
        ({"speech": torch.zeros(2, 13, 2, 6)}, r"\(13, 2, 6\) for each clip, expected \(9, 2, 6\)"),
        ({"speech_second": torch.zeros(2, 9, 2, 6)}, "model.second_speaker=false: set it to true"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, message):
    model = build_mst_controlnet(TINY)
    with pytest.raises(ValueError, match=message):
        model(**{**inputs(TINY), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "hunyuan"}, "model.variant='hunyuan': must be one of cogvideox, wan"),
        ({"conv_groups": 5}, "model.conv_groups=5: must divide .* = 96"),
        ({"in_channels": 4}, "model.in_channels=4: must be at least model.out_channels=6"),
        ({"interaction_heads": 5}, "model.control_dim=24: must be a multiple of model.interaction_heads=5"),
        ({"head_dim": 24}, "model.head_dim=24: must be a multiple of 16"),
        ({"temporal_factor": 8}, "model.temporal_factor=8"),
        ({"num_layers": 0}, "model.num_layers=0: must be at least 1"),
        ({"num_interaction_blocks": -1}, "model.num_interaction_blocks=-1: must be 0 or more"),
    ],
)
def test_impossible_sizes_are_refused_by_key(changes, message):
    with pytest.raises(ValueError, match=message):
        build_mst_controlnet(replace(TINY, **changes))


@BOTH
def test_training_works_after_a_validation_in_inference_mode(config):
    model, x = build_mst_controlnet(config), inputs(config)
    with torch.inference_mode():
        model(**x)
    model(**x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_sizes_are_a_schema_without_torch():
    code = "import sys, avlit.models.sizes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
    schema = OmegaConf.structured(MSTControlNetConfig)
    schema.num_layers = 4
    assert OmegaConf.to_object(schema) == MSTControlNetConfig(num_layers=4)
