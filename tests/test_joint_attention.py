from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed
from torch import Tensor
from torch.nn import functional as F

from avlit.models.aligned_rope import aligned_positions, aligned_rotary
from avlit.models.joint_attention import Heads, Mode, joint_attention, project_heads
from avlit.models.rotation import rotate_pairs

MODES: tuple[Mode, ...] = ("joint", "one-way", "separate")
LENGTHS = (12, 7, 3, 5)  # of tokens: JoVA has four streams


def streams(count: int = 2, *, clips: int = 3, seed: int = 0) -> list[Heads]:
    random = torch.Generator().manual_seed(seed)
    return [Heads(*(torch.randn(clips, 2, n, 8, generator=random) for _ in range(3))) for n in LENGTHS[:count]]


def visible(count: int, mode: Mode) -> Tensor:
    """Which stream's queries see which stream's keys, token by token."""
    of_stream = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS[:count])])
    same = of_stream[:, None] == of_stream
    return {"joint": torch.ones_like(same), "separate": same, "one-way": same | (of_stream[:, None] > 0)}[mode]


def dense(given: list[Heads], mode: Mode) -> list[Tensor]:
    """The same as one softmax over all tokens under a mask, in float64."""
    query, key, value = (torch.cat([getattr(s, name) for s in given], 2).double() for name in ("query", "key", "value"))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible(len(given), mode), float("-inf")).softmax(-1)
    out = (weights @ value).transpose(1, 2).flatten(2).float()
    return list(out.split([s.num_tokens for s in given], dim=1))


def masked(given: list[Heads], mode: Mode) -> list[Tensor]:
    """The same as torch's attention with a dense mask."""
    query, key, value = (torch.cat([getattr(s, name) for s in given], 2) for name in ("query", "key", "value"))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible(len(given), mode))
    return list(out.transpose(1, 2).flatten(2).split([s.num_tokens for s in given], dim=1))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_one_softmax_under_its_mask(mode, count):
    given = streams(count)
    for found, expected, by_torch in zip(
        joint_attention(given, mode=mode), dense(given, mode), masked(given, mode), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(found, by_torch, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["one-way", "separate"])
def test_a_blind_first_stream_is_bit_identical_whatever_the_others_are(mode):
    given = streams(3)
    alone = joint_attention(given[:1], mode="joint")[0]
    for others in (streams(3, seed=1)[1:], streams(4, seed=2)[2:], [Heads(*(torch.full((3, 2, 9, 8), 1e4),) * 3)]):
        assert torch.equal(joint_attention([given[0], *others], mode=mode)[0], alone)
    assert not torch.equal(joint_attention(given, mode="joint")[0], alone)


def test_one_way_gradients_reach_the_first_streams_keys_and_values_but_not_its_queries():
    given = streams(2)
    for stream in given:
        for tensor in (stream.query, stream.key, stream.value):
            tensor.requires_grad_(True)
    video, audio = joint_attention(given, mode="one-way")
    of_audio = torch.autograd.grad(
        audio.square().sum(), (given[0].query, given[0].key, given[0].value), retain_graph=True, allow_unused=True
    )
    assert of_audio[0] is None
    assert all(gradient.abs().max() > 0 for gradient in of_audio[1:])
    of_video = torch.autograd.grad(
        video.square().sum(), (given[1].query, given[1].key, given[1].value), allow_unused=True
    )
    assert of_video == (None, None, None)


@pytest.mark.parametrize(
    "modes", [("joint", "one-way", "joint"), ("separate", "one-way", "one-way"), ("joint", "joint", "joint")]
)
def test_each_clip_of_a_batch_can_have_its_own_mode(modes):
    given = streams(2)
    together = joint_attention(given, mode=modes)
    for i, mode in enumerate(modes):
        alone = joint_attention([s.of_clips(i, i + 1) for s in given], mode=mode)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


def test_unknown_modes_and_another_number_of_modes_are_refused():
    with pytest.raises(ValueError, match="mode='oneway': must be one of joint, one-way, separate"):
        joint_attention(streams(), mode="oneway")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="mode='both': must be one of"):
        joint_attention(streams(), mode=["joint", "both", "joint"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="2 modes for 3 clips"):
        joint_attention(streams(), mode=["joint", "joint"])


def test_one_stream_of_wan_is_its_stock_attention_bit_for_bit():
    attention: Any = WanAttention(dim=48, heads=2, dim_head=24, processor=WanAttnProcessor())
    cos, sin = WanRotaryPosEmbed(24, (1, 2, 2), 16)(torch.empty(1, 1, 3, 4, 4))
    tokens = torch.randn(2, 12, 48)
    with torch.no_grad():
        attention.norm_q.weight.normal_(1, 0.3)
        attention.norm_k.weight.normal_(1, 0.3)
        heads = project_heads(attention, tokens, (cos[0, :, 0], sin[0, :, 0]))
        (gathered,) = joint_attention([heads], mode="joint")
        assert torch.equal(attention.to_out[0](gathered), attention(tokens, None, None, (cos, sin)))


def test_heads_of_hunyuan_are_normalised_each_and_rotated_as_diffusers_does():
    attention: Any = Attention(query_dim=48, heads=2, dim_head=24, qk_norm="rms_norm", bias=True)
    rotary = aligned_rotary(6, num_frames=4, axes=(8, 8, 8), theta=256.0)
    tokens = torch.randn(2, 6, 48)
    with torch.no_grad():
        attention.norm_q.weight.normal_(1, 0.3)
        for positions in (rotary, None):
            heads = project_heads(attention, tokens, positions)
            expected: Any = attention.norm_q(attention.to_q(tokens).unflatten(-1, (2, 24)).transpose(1, 2))
            if positions is not None:
                expected = apply_rotary_emb(expected, positions)  # pyright: ignore[reportArgumentType]
            torch.testing.assert_close(heads.query, expected, rtol=0, atol=1e-6)


# Positions of sound on the video's time axis.


@pytest.mark.parametrize("num_frames", [1, 2, 3, 13, 31])
def test_sound_at_the_time_of_a_frame_is_turned_as_that_frame_and_not_in_space(num_frames):
    rope = WanRotaryPosEmbed(24, (1, 2, 2), 64)
    frame_cos, frame_sin = (part[0, :, 0] for part in rope(torch.empty(1, 1, num_frames, 2, 2)))  # one token a frame
    time = rope.t_dim
    for num_tokens in (1, 2, 5, num_frames, 3 * num_frames, 7 * num_frames, 7 * num_frames + 1, 217):
        cos, sin = aligned_rotary(num_tokens, num_frames=num_frames, axes=(rope.t_dim, rope.h_dim, rope.w_dim))
        assert cos.shape == sin.shape == (num_tokens, 24)
        met = [(token, token * num_frames // num_tokens) for token in range(num_tokens)]
        met = [(token, frame) for token, frame in met if token * num_frames == frame * num_tokens]
        assert met  # the first token at least
        for token, frame in met:
            assert torch.equal(cos[token, :time], frame_cos[frame, :time])
            assert torch.equal(sin[token, :time], frame_sin[frame, :time])
        assert (cos[:, time:] == 1).all()
        assert (sin[:, time:] == 0).all()


def test_217_tokens_over_31_frames_meet_every_frame():
    positions = aligned_positions(217, num_frames=31)
    assert positions[::7].tolist() == list(range(31))
    assert torch.allclose(positions.diff(), torch.tensor(1 / 7, dtype=torch.float64))


def test_sound_of_another_length_has_the_same_time_between_tokens():
    whole = aligned_rotary(217, num_frames=31, axes=(8, 8, 8))
    for num_tokens in (1, 8, 50, 218):
        part = aligned_rotary(num_tokens, num_frames=num_tokens * 31 / 217, axes=(8, 8, 8))
        for found, expected in zip(part, whole, strict=True):
            torch.testing.assert_close(found[:217], expected[:num_tokens], rtol=0, atol=1e-6)


def test_angles_are_positions_times_the_frequencies_of_the_time_axis():
    cos, sin = aligned_rotary(10, num_frames=3, axes=(8, 4, 4), theta=256.0)
    for token in range(10):
        for pair in range(4):
            angle = torch.tensor(token * 3 / 10 * 256.0 ** (-2 * pair / 8))
            for dim in (2 * pair, 2 * pair + 1):
                torch.testing.assert_close(cos[token, dim], angle.cos(), rtol=0, atol=1e-6)
                torch.testing.assert_close(sin[token, dim], angle.sin(), rtol=0, atol=1e-6)


def test_frames_of_hunyuan_share_its_angles():
    rope = HunyuanVideoRotaryPosEmbed(2, 1, [16, 56, 56], 256.0)
    frame_cos, frame_sin = rope(torch.empty(1, 1, 9, 2, 2))
    cos, sin = aligned_rotary(45, num_frames=9, axes=(16, 56, 56), theta=256.0)
    torch.testing.assert_close(cos[::5, :16], frame_cos[:, :16], rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[::5, :16], frame_sin[:, :16], rtol=0, atol=1e-6)


def test_rotated_sound_keeps_its_spatial_dimensions_bit_for_bit():
    x = torch.randn(2, 3, 11, 24)
    turned = rotate_pairs(x, *aligned_rotary(11, num_frames=4, axes=(8, 8, 8)))
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert torch.equal(turned[..., 0, :], x[..., 0, :])  # the first token is at time 0
    assert (turned[..., 1:, :8] != x[..., 1:, :8]).any(-1).all()


def test_what_has_no_positions_is_refused():
    for num_tokens, num_frames in ((0, 4), (3, 0), (3, -1.5), (3, float("nan")), (3, float("inf"))):
        message = f"{num_tokens} sound tokens over {num_frames} latent frames: both must be positive"
        with pytest.raises(ValueError, match=message):
            aligned_rotary(num_tokens, num_frames=num_frames, axes=(8, 8, 8))
    with pytest.raises(ValueError, match=r"axes=\(7, 9, 8\): rotary embeddings turn pairs"):
        aligned_rotary(4, num_frames=4, axes=(7, 9, 8))
