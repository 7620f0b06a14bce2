"""What a model is given besides noise: conditions left out of some clips, and latents that are given clean."""

import numpy as np
import torch
from torch import Tensor


def kept(condition: Tensor, keep: np.ndarray) -> Tensor:
    """The condition [B, ...] of the clips where `keep`, bool [B] on the host, is True; zeros for the others.

    Zeros stand for "no condition", which guidance later contrasts with (classifier-free guidance).
    """
    if keep.all():
        return condition
    rows = torch.from_numpy(keep).to(condition.dtype).to(condition.device, non_blocking=True)
    return condition * rows.view(-1, *[1] * (condition.ndim - 1))


def give_frames(noisy: Tensor, clean: Tensor, timestep: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy video latents [B, C, T, h, w] with the `given` latent frames, bool [B, T], clean; and their timesteps.

    timestep [B] becomes [B, T], 0 where a frame is given: noise levels by token, as Wan2.2-TI2V-5B takes them.
    """
    frames = given[:, None, :, None, None]  # [B, 1, T, 1, 1]
    return torch.where(frames, clean, noisy), timestep[:, None] * ~given
