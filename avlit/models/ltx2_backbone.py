"""LTX-2's transformer for video and sound, the stock diffusers model, run block by block.

A control can act between the blocks. Without one the result is the stock model's, bit for bit: its submodules are
called in its order. N = T * h * w video tokens, L audio tokens, S text tokens; D is the width of video or of sound.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformer3DModel
from torch import Tensor

from avlit.models.backbones import Rotary, Stock
from avlit.models.sizes import LTX2Config

Modality = Literal["video", "audio"]


@dataclass(frozen=True)
class LatentGrid:
    """Where latents lie in seconds and pixels, by which LTX-2 places video and sound on one clock.

    fps: pixel frames a second. temporal_factor: pixel frames of a latent frame; the first holds one alone.
    spatial_factor: pixels of a latent cell's side. audio_rate: audio latents a second. audio_factor: spectrogram frames
    of an audio latent, of which the first holds one alone; 1 for a codec whose latents all last equally long.
    The defaults are LTX-2's codecs.
    """

    fps: float
    temporal_factor: int = 8
    spatial_factor: int = 32
    audio_rate: float = 25.0
    audio_factor: int = 4


def build_ltx2(config: LTX2Config) -> Stock:
    """The stock model of this size; what the config leaves out has the released LTX-2 19B's value."""
    width, audio_width = config.video_dim, config.audio_dim
    return LTX2VideoTransformer3DModel(
        in_channels=config.video_channels,
        out_channels=config.video_channels,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.video_head_dim,
        cross_attention_dim=width,
        pos_embed_max_pos=config.max_seconds,
        base_height=config.max_pixels,
        base_width=config.max_pixels,
        audio_in_channels=config.audio_channels,
        audio_out_channels=config.audio_channels,
        audio_num_attention_heads=config.num_heads,
        audio_attention_head_dim=config.audio_head_dim,
        audio_cross_attention_dim=audio_width,
        audio_pos_embed_max_pos=config.max_seconds,
        num_layers=config.num_layers,
        caption_channels=config.text_dim,
        rope_type="split",
    )


@torch.no_grad()
def calm_ltx2(backbone: Stock) -> None:
    """A drawn backbone to one that learns well from the start; released weights need none of it.

    The stock model draws the tables of attention between the streams with unit variance, gates included, and a head
    that is not zero. Here they have the variance 1/D of its other tables, and the head predicts zero.
    """
    for block in backbone.transformer_blocks:
        for table in (block.video_a2v_cross_attn_scale_shift_table, block.audio_a2v_cross_attn_scale_shift_table):
            table.div_(table.shape[-1] ** 0.5)
    for head in (backbone.proj_out, backbone.audio_proj_out):
        head.weight.zero_()
        head.bias.zero_()


# Coordinates.


def video_coords(
    frames: int, height: int, width: int, *, grid: LatentGrid, num_references: int = 0, device: torch.device | str
) -> Tensor:
    """Start and end of every video token, [1, 3, N, 2]: seconds, then rows and columns in pixels.

    Of the latent frames, the first `num_references` are images that precede the clip by one pixel frame each: the last
    lasts from -1/fps to 0. The others keep the stock model's times: shifted, they would no longer match their sound.
    """
    generated = _causal_spans(frames - num_references, grid.temporal_factor, grid.fps, device)
    times = torch.cat((_spans_before_zero(num_references, grid.fps, device), generated))  # [T, 2]
    rows, columns = (_edges(size, device) * grid.spatial_factor for size in (height, width))  # [h, 2], [w, 2]
    size = (frames, height, width, 2)
    axes = (times[:, None, None], rows[None, :, None], columns[None, None, :])
    return torch.stack([axis.expand(size) for axis in axes]).flatten(1, 3)[None]


def audio_coords(num_latents: int, *, grid: LatentGrid, num_references: int = 0, device: torch.device | str) -> Tensor:
    """Start and end of every audio token in seconds, [1, 1, L, 2].

    The first `num_references` are another sound that ends where the clip begins; the others keep the stock times.
    """
    generated = _causal_spans(
        num_latents - num_references, grid.audio_factor, grid.audio_rate * grid.audio_factor, device
    )
    return torch.cat((_spans_before_zero(num_references, grid.audio_rate, device), generated))[None, None]


def _edges(count: int, device: torch.device | str) -> Tensor:
    """[count, 2]: (0, 1), (1, 2), …"""
    start = torch.arange(count, dtype=torch.float32, device=device)
    return torch.stack((start, start + 1), dim=-1)


def _causal_spans(count: int, factor: int, rate: float, device: torch.device | str) -> Tensor:
    """Seconds [count, 2] of latents that hold `factor` frames each, the first a single one, at `rate` frames a second.

    The arithmetic is that of the stock model, so that its own factors give its own bits.
    """
    return (_edges(count, device) * factor + 1 - factor).clamp(min=0) / rate


def _spans_before_zero(count: int, rate: float, device: torch.device | str) -> Tensor:
    return (_edges(count, device) - count) / rate


def ltx2_rotary(backbone: Stock, modality: Modality, coords: Tensor) -> tuple[Rotary, Rotary]:
    """Cosines and sines [1, heads, tokens, head / 2], for self-attention and for attention to the other modality.

    The latter see time alone. In float32, whatever the model's precision.
    """
    own, cross = {
        "video": (backbone.rope, backbone.cross_attn_rope),
        "audio": (backbone.audio_rope, backbone.cross_attn_audio_rope),
    }[modality]
    return own(coords), cross(coords[:, :1])


# A forward pass.


@dataclass(frozen=True)
class Conditions:
    """What every block reads besides the tokens of one modality. M is 1, or the tokens where each has its own time.

    time [B, M, 6D]: modulation by the timestep; head_time [B, M, D]: the output head's; cross_time [B, M, 4D] and
    cross_gate [B, M, D]: of attention to the other modality. text [B, S, D]; text_mask [B, 1, S]: added to the scores,
    None where all text counts. rotary, cross_rotary: see `ltx2_rotary`, for B clips.
    """

    time: Tensor
    head_time: Tensor
    cross_time: Tensor
    cross_gate: Tensor
    text: Tensor
    text_mask: Tensor | None
    rotary: Rotary
    cross_rotary: Rotary


def ltx2_tokens(backbone: Stock, modality: Modality, latents: Tensor) -> Tensor:
    """Video latents [B, C, T, h, w] or audio latents [B, L, C] -> tokens [B, N or L, D]."""
    if modality == "video":
        return backbone.proj_in(latents.flatten(2).transpose(1, 2))
    return backbone.audio_proj_in(latents)


def ltx2_conditions(
    backbone: Stock,
    modality: Modality,
    *,
    timestep: Tensor,
    text: Tensor,
    text_mask: Tensor | None,
    rotary: tuple[Rotary, Rotary],
    dtype: torch.dtype,
) -> Conditions:
    """timestep [B] or [B, tokens] from 0 to 1000; text [B, S, D_text]; text_mask [B, S], False where text is padding.

    dtype: of the tokens.
    """
    batch, own = text.shape[0], "" if modality == "video" else "audio_"
    gate = backbone.av_cross_attn_video_a2v_gate if modality == "video" else backbone.av_cross_attn_audio_v2a_gate
    ratio = backbone.config.cross_attn_timestep_scale_multiplier / backbone.config.timestep_scale_multiplier

    def embed(embedder: Stock, time: Tensor) -> list[Tensor]:
        return [x.view(batch, -1, x.shape[-1]) for x in embedder(time, batch_size=batch, hidden_dtype=dtype)]

    time = timestep.flatten()
    modulation, head_time = embed(getattr(backbone, f"{own}time_embed"), time)
    cross_time, _ = embed(getattr(backbone, f"av_cross_attn_{modality}_scale_shift"), time)
    cross_gate, _ = embed(gate, time * ratio)
    bias = None if text_mask is None else ((1 - text_mask.to(dtype)) * -10000.0).unsqueeze(1)
    return Conditions(
        time=modulation,
        head_time=head_time,
        cross_time=cross_time,
        cross_gate=cross_gate,
        text=getattr(backbone, f"{own}caption_projection")(text),
        text_mask=bias,
        rotary=_for_clips(rotary[0], batch),
        cross_rotary=_for_clips(rotary[1], batch),
    )


def _for_clips(rotary: Rotary, batch: int) -> Rotary:
    return rotary[0].expand(batch, -1, -1, -1), rotary[1].expand(batch, -1, -1, -1)


def ltx2_block(
    block: Stock, video: Conditions, audio: Conditions, video_tokens: Tensor, audio_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """One block: tokens of video [B, N, D] and of sound [B, L, D] to the same."""
    return block(
        hidden_states=video_tokens,
        audio_hidden_states=audio_tokens,
        encoder_hidden_states=video.text,
        audio_encoder_hidden_states=audio.text,
        temb=video.time,
        temb_audio=audio.time,
        temb_ca_scale_shift=video.cross_time,
        temb_ca_audio_scale_shift=audio.cross_time,
        temb_ca_gate=video.cross_gate,
        temb_ca_audio_gate=audio.cross_gate,
        video_rotary_emb=video.rotary,
        audio_rotary_emb=audio.rotary,
        ca_video_rotary_emb=video.cross_rotary,
        ca_audio_rotary_emb=audio.cross_rotary,
        encoder_attention_mask=video.text_mask,
        audio_encoder_attention_mask=audio.text_mask,
    )


def ltx2_velocity(backbone: Stock, modality: Modality, conditions: Conditions, tokens: Tensor) -> Tensor:
    """Tokens after the last block [B, N or L, D] -> velocity of each token [B, N or L, C]."""
    own = "" if modality == "video" else "audio_"
    table = getattr(backbone, f"{own}scale_shift_table")[None, None] + conditions.head_time[:, :, None]
    shift, scale = table[:, :, 0], table[:, :, 1]
    normed = getattr(backbone, f"{own}norm_out")(tokens) * (1 + scale) + shift
    return getattr(backbone, f"{own}proj_out")(normed)
