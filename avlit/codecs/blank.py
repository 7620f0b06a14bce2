"""Latents of nothing: a grey video and silence, as a codec encodes them, for what a clip lacks of its conditions.

They follow from codec and size alone, so a recipe makes them once for each shape that it meets; shards hold none.
"""

import math

import torch
from torch import Tensor

from avlit.codecs import AudioCodec, VideoCodec


def grey_latents(codec: VideoCodec, *, num_frames: int, height: int, width: int) -> Tensor:
    """Latents [1, C, T, h, w] of a video of zeros in [-1, 1]; sizes in frames and pixels that fit the codec."""
    return codec.encode(torch.zeros(1, 3, num_frames, height, width)).float()


def silence_latents(codec: AudioCodec, num_latents: int) -> Tensor:
    """The first `num_latents` latents of longer silence, [1, L, C]; ValueError for fewer than one."""
    if num_latents < 1:
        raise ValueError(f"num_latents={num_latents}: silence has at least one")
    per_second = codec.num_latents(1000.0) / 1000.0
    duration_s = (num_latents + 2) / per_second  # beyond them, so that no latent knows where the silence ends
    return codec.encode(torch.zeros(1, math.ceil(duration_s * codec.rate_hz)))[:, :num_latents].float()
