"""How near a generated picture is to the true one; exact, and without weights."""

import torch
from torch import Tensor

SQUARED_PEAK = 4.0
"""Of pictures in [-1, 1]."""


def psnr(video: Tensor, truth: Tensor, *, counted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over the counted pixels, at most 100.

    video, truth [3, F, H, W] in [-1, 1]; counted: bool [F, H, W]. ValueError where none is counted.
    """
    if not counted.any():
        raise ValueError("psnr: no pixel is counted")
    error = (video.double() - truth.double()).square().mean(0)[counted].mean()
    return min(100.0, float(10 * torch.log10(SQUARED_PEAK / error.clamp_min(1e-12))))
