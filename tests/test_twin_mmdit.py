import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from avlit.models import joint_attention
from avlit.models.backbones import LayerRun
from avlit.models.joint_attention import Heads, Mode
from avlit.models.mmdit_block import Branch, Meeting, dual_block, fuse, single_block
from avlit.models.mmdit_branch import BranchText
from avlit.models.sizes import Fusion, TwinMMDiTConfig, hunyuanvideo, waver_1_6b, waver_12b
from avlit.models.twin_mmdit import TwinMMDiT, duplicate_video, load_released, mmdit_trainable
from avlit.models.twin_wan import Velocities

TINY = TwinMMDiTConfig(
    num_layers=2,
    num_single_layers=2,
    num_heads=2,
    head_dim=16,
    mlp_ratio=2.0,
    num_refiner_layers=1,
    text_dim=12,
    rope_axes=(4, 6, 6),
    video_channels=4,
    image_channels=5,
    audio_channels=5,
)
DISTILLED = replace(TINY, pooled_dim=7, embedded_guidance=6.0)  # as HunyuanVideo
FUSIONS: tuple[Fusion, ...] = get_args(Fusion)
LAYERS = TINY.num_layers + TINY.num_single_layers
TIMES = torch.tensor([300.0, 700.0])
PADDED = {"video": (7, 3), "audio": (2, 5)}


def inputs(config: TwinMMDiTConfig = TINY, *, padded: bool = False) -> dict[str, Any]:
    random = torch.Generator().manual_seed(7)
    texts = {
        name: BranchText(
            torch.randn(2, tokens, config.text_dim, generator=random),
            PADDED[name] if padded else None,
            None if config.pooled_dim is None else torch.randn(2, config.pooled_dim, generator=random),
        )
        for name, tokens in (("video", 7), ("audio", 5))
    }
    return {
        "video_latents": torch.randn(2, config.video_channels, 3, 4, 6, generator=random),
        "audio_latents": torch.randn(2, 11, config.audio_channels, generator=random),
        "video_text": texts["video"],
        "audio_text": texts["audio"],
        "video_timestep": TIMES.clone(),
        "audio_timestep": TIMES.flip(0),
    }


def awake(config: TwinMMDiTConfig = TINY) -> TwinMMDiT:
    """A model in the middle of training: nothing is zero any more."""
    model = TwinMMDiT(config)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)
    return model


def run(model: TwinMMDiT, x: dict[str, Any], **changes: Any) -> Velocities:
    with torch.no_grad():
        return model(**{**x, **changes})


NO_VIDEO: dict[str, Any] = {"video_latents": None, "video_text": None, "video_timestep": None, "num_frames": 3}
NO_AUDIO: dict[str, Any] = {"audio_latents": None, "audio_text": None, "audio_timestep": None}


def both(velocities: Velocities) -> tuple[Tensor, Tensor]:
    assert velocities.video is not None
    assert velocities.audio is not None
    return velocities.video, velocities.audio


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# The stock model within.


def stock_text(text: BranchText) -> tuple[Tensor, Tensor, Tensor]:
    """Features, the stock model's mask of them, and pooled features."""
    lengths = [text.features.shape[1]] * 2 if text.lengths is None else list(text.lengths)
    mask = torch.arange(text.features.shape[1]) < torch.tensor(lengths)[:, None]
    summed = (text.features * mask.float()[..., None]).sum(1) / torch.tensor(lengths)[:, None]
    return text.features, mask, summed if text.pooled is None else text.pooled


def stock(twin: Any, latents: Tensor, timestep: Tensor, text: BranchText, guidance: float | None) -> Tensor:
    features, mask, pooled = stock_text(text)
    scale = None if guidance is None else torch.full((2,), 1000 * guidance, dtype=features.dtype)
    with torch.no_grad():
        return twin(latents, timestep, features, mask, pooled, scale).sample


def stock_video(model: TwinMMDiT, x: dict[str, Any], condition: Tensor | None = None) -> Tensor:
    latents: Tensor = x["video_latents"]
    if condition is None:
        condition = latents.new_zeros(2, model.config.image_channels, *latents.shape[2:])
    latents = torch.cat((latents, condition), dim=1)
    return stock(model.backbone, latents, x["video_timestep"], x["video_text"], model.config.embedded_guidance)


def stock_audio(model: TwinMMDiT, x: dict[str, Any]) -> Tensor:
    latents = x["audio_latents"].transpose(1, 2)[..., None, None]  # a video of one place a frame
    found = stock(model.audio, latents, x["audio_timestep"], x["audio_text"], model.config.embedded_guidance)
    return found[..., 0, 0].transpose(1, 2)


@pytest.mark.parametrize("padded", [False, True], ids=["full texts", "padded texts"])
@pytest.mark.parametrize("config", [TINY, DISTILLED], ids=["pooled here", "pooled and guided"])
def test_separate_video_is_the_stock_model_bit_for_bit(config, padded):
    model, x = awake(config), inputs(config, padded=padded)
    expected = stock_video(model, x)
    assert expected.abs().max() > 0.1
    assert torch.equal(both(run(model, x, mode="separate"))[0], expected)
    alone = run(model, {**x, **NO_AUDIO})
    assert alone.video is not None
    assert torch.equal(alone.video, expected)
    assert alone.audio is None


@pytest.mark.parametrize("padded", [False, True], ids=["full texts", "padded texts"])
@pytest.mark.parametrize("config", [TINY, DISTILLED], ids=["pooled here", "pooled and guided"])
def test_separate_audio_is_the_stock_model_bit_for_bit(config, padded):
    model, x = awake(config), inputs(config, padded=padded)
    rotary = model._audio_rotary(11, 3, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:  # what the stock model lacks is a time axis shared with video
        patch.setattr(model.audio.rope, "forward", lambda _: rotary)
        expected = stock_audio(model, x)
    assert expected.abs().max() > 0.1
    assert torch.equal(both(run(model, x, mode="separate"))[1], expected)
    alone = run(model, {**x, **NO_VIDEO})
    assert alone.audio is not None
    assert torch.equal(alone.audio, expected)
    assert alone.video is None


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_can_be_kept_separate(fusion):
    model, x = awake(replace(TINY, fusion=fusion)), inputs()
    assert torch.equal(both(run(model, x, mode="separate"))[0], stock_video(model, x))


def test_separate_video_is_the_stock_model_bit_for_bit_under_autocast():
    model, x = awake(), inputs(padded=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(both(run(model, x, mode="separate"))[0], stock_video(model, x))


def test_separate_video_is_the_stock_model_bit_for_bit_in_bfloat16():
    model, x = awake(DISTILLED).bfloat16(), inputs(DISTILLED, padded=True)
    for name, value in x.items():
        if isinstance(value, BranchText):
            assert value.pooled is not None
            x[name] = replace(value, features=value.features.bfloat16(), pooled=value.pooled.bfloat16())
        elif "latents" in name:
            x[name] = value.bfloat16()
    assert torch.equal(both(run(model, x, mode="separate"))[0], stock_video(model, x))


# How the branches meet.


def same_twin(model: TwinMMDiT, *, padded: bool) -> tuple[list[Branch], list[Tensor]]:
    """Two branches with the video branch's weights and one time, and random tokens for them."""
    random = torch.Generator().manual_seed(5)
    temb = torch.randn(2, 32, generator=random)
    branches, tokens = [], []
    for name, num_tokens, num_text in (("video", 18, 7), ("audio", 11, 5)):
        angles = torch.rand(num_tokens, 8, generator=random).repeat_interleave(2, dim=1)
        rotary = (torch.cat((angles.cos(), torch.ones(num_text, 16))), torch.cat((angles.sin(), 0 * angles[:num_text])))
        seen = torch.arange(num_text) < torch.tensor(PADDED[name])[:, None]
        seen = torch.cat((torch.ones(2, num_tokens, dtype=torch.bool), seen), dim=1) if padded else None
        branches.append(Branch(model.backbone, num_tokens, temb, rotary, seen))
        tokens += [torch.randn(2, each, 32, generator=random) for each in (num_tokens, num_text)]
    return branches, tokens


@pytest.mark.parametrize("padded", [False, True], ids=["full texts", "padded texts"])
@pytest.mark.parametrize("kind", ["dual", "single"])
def test_joint_branches_of_equal_weights_are_one_stock_block_over_all_their_tokens(kind, padded):
    model = awake()
    branches, (video, video_text, audio, audio_text) = same_twin(model, padded=padded)
    ends = [branch.num_tokens for branch in branches]
    rotary = tuple(torch.cat([b.rotary[i][:end] for b, end in zip(branches, ends, strict=True)]) for i in (0, 1))
    mask = None
    if padded:
        of_text = [cast(Tensor, b.seen)[:, end:] for b, end in zip(branches, ends, strict=True)]
        mask = torch.cat([torch.ones(2, sum(ends), dtype=torch.bool), *of_text], dim=1)[:, None, None]
    is_dual, meeting = kind == "dual", Meeting("joint", "joint", None)
    block = (model.backbone.transformer_blocks if is_dual else model.backbone.single_transformer_blocks)[1]
    with torch.no_grad():
        latents, text = block(
            torch.cat((video, audio), 1), torch.cat((video_text, audio_text), 1), branches[0].temb, mask, rotary
        )
        if is_dual:
            found = dual_block([block, block], branches, meeting, video, video_text, audio, audio_text)
        else:
            merged = (torch.cat((video, video_text), 1), torch.cat((audio, audio_text), 1))
            parts = [
                each.split([end, each.shape[1] - end], dim=1)
                for each, end in zip(single_block([block, block], branches, meeting, *merged), ends, strict=True)
            ]
            found = [*parts[0], *parts[1]]
    close(torch.cat((found[0], found[2]), 1), latents)
    close(torch.cat((found[1], found[3]), 1), text)


def softmax_read(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in float64, [B, heads, M, head] -> [B, M, heads * head]."""
    weights = (query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return (weights @ value.double()).transpose(1, 2).flatten(2).float()


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("fusion", ["cross", "cross_linear"])
def test_cross_attention_adds_what_latents_read_of_the_other_latents(fusion, mode):
    model = awake(replace(TINY, fusion="cross_linear"))
    random = torch.Generator().manual_seed(1)
    heads = [Heads(*(torch.randn(2, 2, n, 16, generator=random) for _ in range(3))) for n in (18 + 7, 11 + 5)]
    branches = same_twin(model, padded=False)[0]
    adapters = [cast(nn.ModuleList, each)[3] for each in (model.video_adapters, model.audio_adapters)]
    with torch.no_grad():
        found = fuse(branches, heads, Meeting(fusion, mode, None, adapters if fusion == "cross_linear" else ()))
    for i, (own, other) in enumerate((heads, heads[::-1])):
        end, other_end = branches[i].num_tokens, branches[1 - i].num_tokens
        expected = softmax_read(own.query, own.key, own.value)
        if mode == "joint" or (mode == "one-way" and i == 1):
            crossed = softmax_read(own.query[:, :, :end], other.key[:, :, :other_end], other.value[:, :, :other_end])
            if fusion == "cross_linear":
                adapter = adapters[i]
                crossed = crossed @ cast(Tensor, adapter.weight).T + cast(Tensor, adapter.bias)
            expected[:, :end] += crossed.detach()
        close(found[i], expected)


def test_an_untrained_linear_adapter_leaves_the_branches_as_they_were_alone():
    x, separate = inputs(), both(run(awake(), inputs(), mode="separate"))
    weights = awake().state_dict()
    models = {fusion: TwinMMDiT(replace(TINY, fusion=fusion)) for fusion in ("cross_linear", "cross")}
    for fusion, model in models.items():
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert len(missing) == (4 * LAYERS if fusion == "cross_linear" else 0) and not unexpected
    for found, expected in zip(both(run(models["cross_linear"], x)), separate, strict=True):
        assert torch.equal(found, expected)
    assert (both(run(models["cross"], x))[0] - separate[0]).abs().max() > 1e-2
    for adapters in (models["cross_linear"].video_adapters, models["cross_linear"].audio_adapters):
        for adapter in cast(nn.ModuleList, adapters):
            nn.init.eye_(cast(Tensor, adapter.weight))
    for found, expected in zip(both(run(models["cross_linear"], x)), both(run(models["cross"], x)), strict=True):
        close(found, expected)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_joined_branches_change_each_other(fusion):
    model, x = awake(replace(TINY, fusion=fusion)), inputs()
    video, audio = both(run(model, x))
    assert (both(run(model, x, audio_latents=2 * x["audio_latents"]))[0] - video).abs().max() > 1e-2
    assert (both(run(model, x, video_latents=2 * x["video_latents"]))[1] - audio).abs().max() > 1e-2
    separate = both(run(model, x, mode="separate"))
    assert (separate[0] - video).abs().max() > 1e-2
    assert torch.equal(both(run(model, x, mode="separate", audio_latents=2 * x["audio_latents"]))[0], separate[0])
    assert torch.equal(both(run(model, x, mode="separate", video_latents=2 * x["video_latents"]))[1], separate[1])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_one_way_video_is_bit_identical_whatever_the_sound_is(fusion):
    model, x = awake(replace(TINY, fusion=fusion)), inputs(padded=True)
    video, audio = both(run(model, x, mode="one-way"))
    for changes in (
        {"audio_latents": torch.full((2, 4, 5), 1e6)},
        {"audio_text": BranchText(torch.ones(2, 3, 12))},
        {"audio_timestep": torch.tensor([0.0, 999.0])},
    ):
        assert torch.equal(both(run(model, x, mode="one-way", **changes))[0], video)
    assert torch.equal(both(run(model, x, mode="separate"))[0], video)
    assert (both(run(model, x, mode="one-way", video_latents=2 * x["video_latents"]))[1] - audio).abs().max() > 1e-2


def test_each_branch_reads_the_text_of_the_other():
    model, x = awake(), inputs()
    before = both(run(model, x))
    for name, i in (("audio_text", 0), ("video_text", 1)):
        found = both(run(model, x, **{name: BranchText(x[name].features.flip(0))}))
        assert (found[i] - before[i]).abs().max() > 1e-3


def observed(model: TwinMMDiT, x: dict[str, Any]) -> list[list[Heads]]:
    seen: list[list[Heads]] = []

    def observe(layer: int, streams: Any) -> None:
        assert layer == len(seen)
        seen.append(list(streams))

    run(model, x, observe=observe)
    return seen


def test_observers_are_told_what_every_stream_brings_to_every_block():
    model, x = awake(), inputs()
    layers = observed(model, x)
    assert len(layers) == LAYERS
    assert all([each.num_tokens for each in streams] == [18, 11, 7, 5] for streams in layers)
    assert all(streams[0].query.shape == (2, 2, 18, 16) for streams in layers)
    assert [each.num_tokens for each in observed(model, {**x, **NO_VIDEO})[0]] == [11, 5]


# Texts of different lengths.


@pytest.mark.parametrize("fusion", FUSIONS)
def test_nobody_reads_padded_text(fusion):
    model, x = awake(replace(TINY, fusion=fusion)), inputs(padded=True)
    expected = both(run(model, x))
    for i in range(2):  # each clip with texts of its own length
        alone: dict[str, Any] = {name: value[i : i + 1] for name, value in x.items() if isinstance(value, Tensor)}
        for name in ("video", "audio"):
            alone[f"{name}_text"] = BranchText(x[f"{name}_text"].features[i : i + 1, : PADDED[name][i]])
        for found, each in zip(both(run(model, alone)), expected, strict=True):
            close(found, each[i : i + 1])
    noisy = dict(x)
    for name in ("video", "audio"):
        features = x[f"{name}_text"].features.clone()
        for i, length in enumerate(PADDED[name]):
            features[i, length:] = 1e3
        noisy[f"{name}_text"] = replace(x[f"{name}_text"], features=features)
    for found, each in zip(both(run(model, noisy)), expected, strict=True):
        close(found, each)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_attention_takes_a_mask_only_where_a_text_is_padded(monkeypatch, fusion):
    masks: list[Tensor | None] = []
    ordinary = joint_attention.scaled_dot_product_attention

    def listen(*args: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        masks.append(attn_mask)
        return ordinary(*args, attn_mask=attn_mask)

    monkeypatch.setattr(joint_attention, "scaled_dot_product_attention", listen)
    model = awake(replace(TINY, fusion=fusion))
    full = inputs()
    full["video_text"] = replace(full["video_text"], lengths=(7, 7))
    run(model, full)
    assert masks and all(mask is None for mask in masks)
    masks.clear()
    run(model, inputs(padded=True))
    assert masks and all(mask is not None and mask.shape[:3] == (2, 1, 1) for mask in masks)


def test_lengths_of_whole_texts_change_nothing():
    model, x = awake(), inputs()
    told = {**x, "video_text": replace(x["video_text"], lengths=(7, 7))}
    for found, expected in zip(both(run(model, told)), both(run(model, x)), strict=True):
        assert torch.equal(found, expected)


# Positions.


def test_sound_without_video_stands_where_it_stands_with_it():
    model, x = awake(), inputs()
    alone = run(model, {**x, **NO_VIDEO}).audio
    assert alone is not None
    for num_frames in (9, 3.4):
        elsewhere = run(model, {**x, **NO_VIDEO}, num_frames=num_frames).audio
        assert elsewhere is not None
        assert (elsewhere - alone).abs().max() > 1e-3


def test_aligned_positions_turn_what_happens_at_once_alike():
    model, x = awake(), {**inputs(), "audio_latents": torch.randn(2, 12, 5)}  # four sounds a latent frame
    run(model, x)
    audio = model._audio_rotary(12, 3, torch.device("cpu"))
    video = model._video_rotary(3, 4, 6, torch.device("cpu"))
    for of_audio, of_video, still in zip(audio, video, (1, 0), strict=True):
        times = of_video.unflatten(0, (3, 6))[:, 0, : TINY.rope_axes[0]]
        torch.testing.assert_close(of_audio[::4, : TINY.rope_axes[0]], times, rtol=0, atol=1e-6)
        assert (of_audio[:, TINY.rope_axes[0] :] == still).all()


def test_without_alignment_sound_counts_its_latents():
    x = inputs()
    plain, aligned = awake(replace(TINY, aligned_rope=False)), awake()
    found = both(run(plain, x))
    assert (found[1] - both(run(aligned, x))[1]).abs().max() > 1e-3
    alone = [run(plain, {**x, **NO_VIDEO}, num_frames=frames).audio for frames in (3, 11)]
    as_video = run(aligned, {**x, **NO_VIDEO}, num_frames=11).audio
    assert alone[0] is not None and alone[1] is not None and as_video is not None
    assert torch.equal(alone[0], alone[1])
    assert torch.equal(alone[0], as_video)
    close(alone[0], stock_audio(plain, x))  # whole positions are those of the stock model


# The reference image.


def test_an_image_stands_beside_the_first_frame_with_its_mask():
    model, x = awake(), inputs()
    image = torch.randn(2, 4, 1, 4, 6)
    condition = torch.zeros(2, 5, 3, 4, 6)
    condition[1, :4, 0] = image[1, :, 0]
    condition[1, 4, 0] = 1
    found = run(model, {**x, **NO_AUDIO}, image=image, has_image=torch.tensor([False, True])).video
    assert found is not None
    assert torch.equal(found, stock_video(model, x, condition))
    close(found[:1], stock_video(model, x)[:1])
    given_to_all = run(model, {**x, **NO_AUDIO}, image=image).video
    assert given_to_all is not None
    assert (given_to_all - found)[0].abs().max() > 1e-2
    assert (given_to_all - found)[1].abs().max() < 1e-5


def test_an_image_of_zeros_is_told_from_none():
    model, x = awake(), inputs()
    black = both(run(model, x, image=torch.zeros(2, 4, 1, 4, 6)))[0]
    assert (black - both(run(model, x))[0]).abs().max() > 1e-2


def test_a_model_without_image_channels_is_the_stock_model():
    model, x = awake(replace(TINY, image_channels=0)), inputs()
    assert torch.equal(both(run(model, x, mode="separate"))[0], stock_video(model, x))


# What learns.


def gradients(model: TwinMMDiT, x: dict[str, Any]) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    found = model(**x)
    torch.stack([each.square().mean() for each in (found.video, found.audio) if each is not None]).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def reached(found: dict[str, Tensor | None]) -> set[str]:
    return {name for name, gradient in found.items() if gradient is not None and gradient.abs().max() > 0}


@pytest.mark.parametrize("which", ["video", "audio"])
def test_a_branch_alone_trains_that_branch(which):
    model = awake(replace(TINY, fusion="cross_linear"))
    found = gradients(model, {**inputs(), **(NO_AUDIO if which == "video" else NO_VIDEO)})
    names = mmdit_trainable(model, which=which)
    assert reached(found) == set(names)
    assert all(found[name] is None for name in found.keys() - set(names))
    assert not [name for name in names if "adapters" in name]


@pytest.mark.parametrize("config", [*(replace(TINY, fusion=f) for f in FUSIONS), DISTILLED], ids=[*FUSIONS, "guided"])
def test_both_branches_together_train_everything(config):
    model = awake(config)
    found = gradients(model, {**inputs(config, padded=True), "image": torch.randn(2, 4, 1, 4, 6)})
    assert reached(found) == set(mmdit_trainable(model, which="all")) == set(found)
    with pytest.raises(ValueError, match="trainable='text': must be one of video, audio, all"):
        mmdit_trainable(model, which="text")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("config", [TINY, replace(TINY, fusion="cross_linear")], ids=["joint", "cross_linear"])
def test_an_untrained_model_predicts_zero_and_learns_within_steps(config):
    model, x = TwinMMDiT(config), inputs()
    assert all(each.abs().max() == 0 for each in both(run(model, x)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        video, audio = both(model(**x))
        loss = (video - x["video_latents"]).square().mean() + (audio - x["audio_latents"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    still = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert not still


@pytest.mark.parametrize("fusion", FUSIONS)
def test_recomputed_blocks_have_the_same_gradients(fusion):
    model, x = awake(replace(TINY, fusion=fusion)), inputs(padded=True)
    kept = gradients(model, x)
    calls = {"dual": 0, "single": 0}

    def count(kind: str) -> Any:
        def hook(*_: object) -> None:
            calls[kind] += 1

        return hook

    model.audio.transformer_blocks[0].ff.register_forward_hook(count("dual"))
    model.audio.single_transformer_blocks[0].proj_mlp.register_forward_hook(count("single"))
    model.layer_run = LayerRun(recompute="blocks")
    recomputed = gradients(model, x)
    assert calls == {"dual": 2, "single": 2}
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=0)


def test_a_model_first_used_for_inference_can_train():
    model = awake()
    with torch.inference_mode():
        model(**inputs())
    assert len(reached(gradients(model, inputs()))) == len(list(model.parameters()))


# Sizes, weights and the released folder.


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


WAVER = {"in_channels": 36, "guidance_embeds": False, "pooled_projection_dim": 4096}


@pytest.mark.parametrize(
    ("config", "stock_config", "branch", "total"),
    [
        (hunyuanvideo(), {"in_channels": 33}, 12_821_221_440, 25.64),
        (waver_12b(), {**WAVER, "num_layers": 16, "num_single_layers": 40}, 11_461_926_976, 22.92),
        (
            waver_1_6b(),
            {**WAVER, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 12},
            1_629_869_120,
            3.26,
        ),
    ],
    ids=["hunyuanvideo", "waver-12b", "waver-1.6b"],
)
def test_sizes_are_stock_models_and_duplicates_of_them(config, stock_config, branch, total):
    with torch.device("meta"):
        model, released = TwinMMDiT(config), HunyuanVideoTransformer3DModel(**stock_config)
    expected = {name: tensor.shape for name, tensor in released.state_dict().items()}
    state = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {n.removeprefix("backbone."): s for n, s in state.items() if n.startswith("backbone.")} == expected
    width, ends = config.inner_dim, config.audio_channels
    expected |= {
        "x_embedder.proj.weight": torch.Size((width, ends, 1, 1, 1)),
        "proj_out.weight": torch.Size((ends, width)),
        "proj_out.bias": torch.Size((ends,)),
    }
    assert {n.removeprefix("audio."): s for n, s in state.items() if n.startswith("audio.")} == expected
    assert len(state) == 2 * len(expected)
    assert count(model.backbone) == branch
    assert round(count(model) / 1e9, 2) == total


def test_hunyuanvideos_released_size_is_ours_without_the_image():
    with torch.device("meta"):
        assert count(TwinMMDiT(replace(hunyuanvideo(), image_channels=0)).backbone) == 12_821_012_544


def test_linear_adapters_are_one_a_block_and_branch():
    plain, adapted = TwinMMDiT(TINY), TwinMMDiT(replace(TINY, fusion="cross_linear"))
    assert count(adapted) - count(plain) == 2 * LAYERS * (32 * 32 + 32)


def test_weights_are_a_function_of_the_seed():
    config = replace(TINY, fusion="cross_linear")
    first = TwinMMDiT(config, seed=1)
    torch.randn(5)
    again, other = TwinMMDiT(config, seed=1), TwinMMDiT(config, seed=2)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    for name in (
        "backbone.x_embedder.proj.weight",
        "audio.x_embedder.proj.weight",
        "audio.context_embedder.proj_in.bias",
    ):
        assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    name = "transformer_blocks.0.ff.net.2.weight"
    assert not torch.equal(first.backbone.state_dict()[name], first.audio.state_dict()[name])
    other.draw_new(seed=1)
    assert torch.equal(first.audio.x_embedder.proj.weight, other.audio.x_embedder.proj.weight)
    before = torch.get_rng_state()
    TwinMMDiT(TINY)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_duplicate_of_the_video_branch_keeps_its_own_ends():
    model, before = awake(), awake().state_dict()
    filled = set(duplicate_video(model))
    ends = {
        f"audio.{name}"
        for name in ("x_embedder.proj.weight", "x_embedder.proj.bias", "proj_out.weight", "proj_out.bias")
    }
    state = model.state_dict()
    assert filled == {name for name in state if name.startswith("audio.")} - ends
    for name in filled:
        assert torch.equal(state[name], state[name.replace("audio.", "backbone.", 1)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items() if name not in filled)
    with torch.no_grad():  # a copy: training one leaves the other
        model.backbone.proj_out.bias.add_(1)
        model.backbone.norm_out.linear.bias.add_(1)
    assert torch.equal(model.state_dict()["audio.norm_out.linear.bias"], before["backbone.norm_out.linear.bias"])


def release(folder: Path, config: TwinMMDiTConfig, *, shard_size: str = "1GB") -> dict[str, Tensor]:
    """A released folder with weights of its own, as diffusers writes it; returns those weights."""
    released: Any = awake(config).backbone
    released.save_pretrained(folder / "transformer", max_shard_size=shard_size)
    return released.state_dict()


TEXT_TO_VIDEO = replace(DISTILLED, image_channels=0)


@pytest.mark.parametrize("shard_size", ["1GB", "50KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("released", [TEXT_TO_VIDEO, DISTILLED], ids=["without image", "with image"])
def test_a_released_folder_fills_both_branches(tmp_path, released, shard_size):
    weights = release(tmp_path, released, shard_size=shard_size)
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (shard_size != "1GB")
    config = replace(DISTILLED, fusion="cross_linear")
    model, before = TwinMMDiT(config), TwinMMDiT(config).state_dict()
    report = load_released(model, tmp_path)
    state = model.state_dict()
    embedder = weights.pop("x_embedder.proj.weight")
    found = state["backbone.x_embedder.proj.weight"]
    assert torch.equal(found[:, : embedder.shape[1]], embedder)
    assert found.shape[1] == 9 and (found[:, embedder.shape[1] :] == 0).all()
    expected = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    expected |= {f"audio.{n}": t for n, t in weights.items() if not n.startswith(("x_embedder.", "proj_out."))}
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert set(report.loaded) == {*expected, "backbone.x_embedder.proj.weight"}
    assert set(report.new) == state.keys() - set(report.loaded)
    assert {name.split(".")[0] for name in report.new} == {"audio", "video_adapters", "audio_adapters"}
    assert report.unused == ()
    assert all(torch.equal(state[name], before[name]) for name in report.new)


def test_new_image_channels_leave_a_released_model_unchanged(tmp_path):
    release(tmp_path, TEXT_TO_VIDEO)
    wide, narrow = TwinMMDiT(DISTILLED), TwinMMDiT(TEXT_TO_VIDEO)
    load_released(wide, tmp_path)
    load_released(narrow, tmp_path)
    x = {**inputs(DISTILLED), **NO_AUDIO}
    expected = stock_video(narrow, x)
    for changes in ({}, {"image": torch.randn(2, 4, 1, 4, 6)}):
        found = run(wide, x, **changes).video
        assert found is not None
        close(found, expected)
    wide(**x, image=torch.randn(2, 4, 1, 4, 6)).video.square().mean().backward()
    assert wide.backbone.x_embedder.proj.weight.grad[:, 4:].abs().amax((0, 2, 3, 4)).min() > 0


def built_on_meta() -> TwinMMDiT:
    with torch.device("meta"):
        model = TwinMMDiT(DISTILLED, seed=4)
    with pytest.raises(ValueError, match=r"the audio branch's ends are on the meta device.*call draw_new first"):
        load_released(model, "nowhere")
    model.draw_new(seed=4)
    return model


@pytest.mark.parametrize("build", [built_on_meta, lambda: TwinMMDiT(DISTILLED, seed=4, draws_video=False)])
def test_branches_that_were_never_drawn_load_and_run(tmp_path, build):
    release(tmp_path, TEXT_TO_VIDEO)
    ordinary = TwinMMDiT(DISTILLED, seed=4)
    load_released(ordinary, tmp_path)
    model = build()
    undrawn = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    assert undrawn == set(load_released(model, tmp_path).loaded)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    x = inputs(DISTILLED)
    for a, b in zip(both(run(model, x)), both(run(ordinary, x)), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        model.audio.norm_out.linear.bias.add_(1)  # a copy here too
    assert torch.equal(model.backbone.norm_out.linear.bias, ordinary.backbone.norm_out.linear.bias)


def test_another_models_folder_is_refused_and_changes_nothing(tmp_path):
    model, before = TwinMMDiT(DISTILLED), TwinMMDiT(DISTILLED).state_dict()
    release(tmp_path, replace(DISTILLED, mlp_ratio=3.0))
    with pytest.raises(ValueError, match=r"another model's weights.*mlp_ratio: expected 2.0, found 3.0"):
        load_released(model, tmp_path)
    release(tmp_path, replace(DISTILLED, embedded_guidance=None))
    with pytest.raises(ValueError, match="guidance_embeds: expected True, found False"):
        load_released(model, tmp_path)
    release(tmp_path, replace(DISTILLED, image_channels=6))
    with pytest.raises(ValueError, match=r"weight is \(32, 10, 1, 2, 2\), expected \(32, 9, 1, 2, 2\) or \(32, 4,"):
        load_released(model, tmp_path)
    release(tmp_path, DISTILLED)
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_condition_type": "token_replace"}))
    with pytest.raises(ValueError, match="image_condition_type: expected latent_concat or none, found token_replace"):
        load_released(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Mistakes.

TEXT = torch.zeros(2, 7, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_latents": None, "audio_latents": None}, "neither video_latents nor audio_latents"),
        ({"video_timestep": None}, "video_latents, video_text and video_timestep go together"),
        ({"audio_text": None}, "audio_latents, audio_text and audio_timestep go together"),
        ({**NO_VIDEO, "num_frames": None}, "num_frames=None: give it for sound without video"),
        ({"num_frames": 3}, "num_frames=3: give it for sound without video, and only then"),
        ({**NO_AUDIO, "mode": "one-way"}, "mode='one-way': a single branch"),
        ({"mode": "blind"}, "mode='blind': must be one of joint, one-way, separate"),
        ({"video_latents": torch.zeros(2, 6, 3, 4, 6)}, "6 channels but model.video_channels=4"),
        ({"video_latents": torch.zeros(2, 4, 3, 4, 5)}, "4x5: must be multiples of model.patch_size=2"),
        ({"audio_latents": torch.zeros(2, 11, 6)}, "6 channels but model.audio_channels=5"),
        ({"video_timestep": torch.zeros(2, 3)}, r"video_timestep has shape \(2, 3\): must be \[B\], here \[2\]"),
        ({"audio_timestep": torch.zeros(1)}, r"audio_timestep has shape \(1,\): must be \[B\], here \[2\]"),
        ({"video_text": BranchText(torch.zeros(2, 7, 13))}, r"video_text has shape \(2, 7, 13\): .* here \[2, S, 12\]"),
        ({"video_text": BranchText(torch.zeros(3, 7, 12))}, r"video_text has shape \(3, 7, 12\)"),
        ({"video_text": BranchText(TEXT, (7, 8))}, r"video_text has lengths \[7, 8\]: must be 2 of 1 to 7"),
        ({"video_text": BranchText(TEXT, (0, 7))}, "a clip without text has one token of zeros"),
        ({"audio_text": BranchText(TEXT, (7,))}, r"audio_text has lengths \[7\]: must be 2 of 1 to 7"),
        ({"audio_text": BranchText(TEXT, None, torch.zeros(2, 3))}, "has pooled features but model.pooled_dim=None"),
        ({"has_image": torch.ones(2, dtype=torch.bool)}, "has_image without image"),
        ({"image": torch.zeros(2, 4, 3, 4, 6)}, r"image has shape \(2, 4, 3, 4, 6\): must be \(2, 4, 1, 4, 6\)"),
        ({**NO_VIDEO, "image": torch.zeros(2, 4, 1, 4, 6)}, "image without video_latents"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TwinMMDiT(TINY)(**{**inputs(), **changes})


def test_conditions_that_the_model_has_no_place_for_are_refused():
    with pytest.raises(ValueError, match=r"an image is given but model.image_channels=0"):
        TwinMMDiT(replace(TINY, image_channels=0))(**inputs(), image=torch.zeros(2, 4, 1, 4, 6))
    with pytest.raises(ValueError, match=r"video_text has no pooled features but model\.pooled_dim=7"):
        TwinMMDiT(DISTILLED)(**inputs())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_single_layers": 0}, "model.num_single_layers=0: must be at least 1"),
        ({"mlp_ratio": 0.0}, "model.mlp_ratio=0: must be positive"),
        ({"pooled_dim": 0}, "model.pooled_dim=0: must be at least 1, or null"),
        ({"rope_axes": (5, 5, 6)}, r"model.rope_axes=\[5, 5, 6\]: must be three even numbers from 2"),
        ({"rope_axes": (4, 6, 8)}, r"model.rope_axes=\[4, 6, 8\]: must add up to model.head_dim=16, not 18"),
        ({"image_channels": 4}, "model.image_channels=4: must be 0, or more than model.video_channels=4"),
        ({"fusion": "sum"}, "model.fusion='sum': must be one of joint, cross_linear, cross"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TwinMMDiT(replace(TINY, **changes))
