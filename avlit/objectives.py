"""What a model is asked to predict, and how far off it is: pure functions from latents to per-sample losses."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """Per-sample losses of one micro-batch, before the one place that reduces and logs them (`AVModule`).

    parts: modality -> loss [B]; the training loss is the sum over the parts of their means over the B clips.
    noise_level [B] in [0, 1]: 0 is clean, 1 is pure noise. weights: part -> its factor in the training loss, 1 without.
    applies: part -> the clips that it is of; the others' loss must be 0, and they are left out of what is logged.
    tasks: what each clip was trained to do, for the log; empty where a recipe has one task.
    measures: name -> number of each clip [B], for the log alone.
    """

    parts: dict[str, Tensor]
    noise_level: Tensor
    weights: dict[str, float] = field(default_factory=dict)
    applies: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    measures: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """The scalar that is differentiated."""
        means = [self.weights.get(name, 1.0) * part.mean() for name, part in self.parts.items()]
        return torch.stack(means).sum()


def cogvideox_alphas_cumprod(*, snr_shift: float = 1.0) -> Tensor:
    """CogVideoX's noise schedule [1000], float32: scaled-linear betas, shifted, zero terminal SNR.

    snr_shift: 1 for the 5B models, 3 for 2B (models.md A). The values are those of diffusers' own scheduler.
    """
    from diffusers.schedulers.scheduling_dpm_cogvideox import CogVideoXDPMScheduler

    return CogVideoXDPMScheduler(**cogvideox_scheduler_config(snr_shift=snr_shift)).alphas_cumprod.float()


def cogvideox_scheduler_config(*, snr_shift: float = 1.0) -> dict[str, Any]:
    """The released scheduler settings of CogVideoX, as diffusers' schedulers take them."""
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "snr_shift_scale": snr_shift,
    }


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1], to scale every element of a sample of `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def diffuse(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """z_t = sqrt(a) z_0 + sqrt(1 - a) eps, with a = alpha_bar [B] in [0, 1] (MTV, Section 4.1)."""
    a = per_sample(alpha_bar, clean)
    return a.sqrt() * clean + (1 - a).sqrt() * noise


def velocity(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The v target: sqrt(a) eps - sqrt(1 - a) z_0.

    MTV's Eq. 1 writes the noise as target; its code, as CogVideoX, trains v, which is defined at zero SNR, too.
    """
    a = per_sample(alpha_bar, clean)
    return a.sqrt() * noise - (1 - a).sqrt() * clean


def flow_diffuse(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_s = (1 - s) x_0 + s eps, with s = sigma [B] in [0, 1]: flow matching as Wan, LTX-2 and Hunyuan train it."""
    s = per_sample(sigma, clean)
    return (1 - s) * clean + s * noise


def flow_velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """The flow's target: eps - x_0."""
    return noise - clean


def shift_sigma(uniform: Tensor, shift: float) -> Tensor:
    """Noise levels [B] from uniform numbers in [0, 1): s u / (1 + (s - 1) u); a shift above 1 prefers high noise."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def unipc_sigma(uniform: np.ndarray, *, shift: float) -> Tensor:
    """Noise levels [B], float32, from uniform numbers in [0, 1): entries of UniPC's table of 1000, all as likely.

    The table is what diffusers' UniPC makes of a flow with this shift: 1 to 0.002 in equal steps before the shift.
    """
    entry = torch.from_numpy(np.floor(1000 * uniform))  # 0 is the least noisy
    return shift_sigma(1 - 0.000999 * (999 - entry), shift).float()


def wan_scheduler_config(*, shift: float) -> dict[str, Any]:
    """The released UniPC settings of Wan, as diffusers' schedulers take them."""
    return {
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "shift": shift,  # the name in flow-matching Euler and Heun
        "solver_order": 2,
    }


def mean_squared_error(pred: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Per-sample mean squared error [B] in float32, over the elements where `mask` (broadcastable, 0 or 1) is 1.

    A sample whose mask is empty has loss 0.
    """
    error = (pred.float() - target.float()).square()
    if mask is None:
        return error.flatten(1).mean(1)
    weight = mask.expand_as(error).float()
    return (error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1)
