"""Rotary positions of sound on the time axis of a video, so that what happens at once is turned by the same angle."""

import math

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor

from avlit.models.backbones import Rotary


def aligned_positions(num_tokens: int, *, num_frames: float) -> Tensor:
    """Positions [L], float64, of L evenly spaced sound tokens, in latent frames of the video: token l at l * T / L.

    num_frames: T, the latent frames that the same duration of video has; whole where there is a video, any positive
    number for sound alone. MMAudio scales the video's positions to the sound's; here the video keeps those that its
    weights were trained with. ValueError for no tokens, or no time for them.
    """
    if num_tokens < 1 or not 0 < num_frames < math.inf:
        raise ValueError(f"{num_tokens} sound tokens over {num_frames} latent frames: both must be positive")
    return torch.arange(num_tokens, dtype=torch.float64, device="cpu") * num_frames / num_tokens


def aligned_rotary(
    num_tokens: int,
    *,
    num_frames: float,
    axes: tuple[int, int, int],
    theta: float = 10000.0,
    device: torch.device | str = "cpu",
) -> Rotary:
    """Cosines and sines [L, head], float32, of sound tokens for attention that is shared with video tokens.

    axes: how the video model splits a head over time, height and width; all even (Wan: 44, 42, 42; HunyuanVideo: 16,
    56, 56 with theta 256). Height and width stay at position 0, which rotates nothing (Ovi; UniTalking, sec. 4.4).
    """
    if any(axis % 2 for axis in axes):
        raise ValueError(f"axes={axes}: rotary embeddings turn pairs, so each must be even")
    positions = aligned_positions(num_tokens, num_frames=num_frames)
    cos, sin = get_1d_rotary_pos_embed(  # [L, time]
        axes[0], positions.numpy(), theta, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64
    )
    still = (num_tokens, axes[1] + axes[2])
    cos, sin = torch.cat((cos, cos.new_ones(still)), dim=1), torch.cat((sin, sin.new_zeros(still)), dim=1)
    return cos.to(device), sin.to(device)  # [L, head]
