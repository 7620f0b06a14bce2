"""What a model is asked to predict, and how far off it is: pure functions from latents to per-sample losses."""

import math
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

    # After the first `from_pretrained` of transformers, `torch.device("meta")` no longer reaches diffusers' linspace:
    # part of the schedule would be made on each device.
    with torch.device("cpu"):
        schedule = CogVideoXDPMScheduler(**cogvideox_scheduler_config(snr_shift=snr_shift))
    return schedule.alphas_cumprod.float().to(torch.get_default_device())


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


def ltx2_mu(num_tokens: int) -> float:
    """LTX-2's shift by the clip's video tokens: 0.95 at 1024, 2.05 at 4096, and on along that line."""
    return 0.95 + (2.05 - 0.95) * (num_tokens - 1024) / (4096 - 1024)


def shifted_logit_normal(uniform: np.ndarray, *, mu: float, uniform_share: float = 0.1, least: float = 1e-3) -> Tensor:
    """Noise levels [B], float32, from uniform numbers in [0, 1): `shifted_logit_normal` of LTX-2's trainer.

    sigmoid(N(mu, 1)), stretched so that its percentiles 0.5 and 99.9 come to 0 and 1; what lies below `least` is
    mirrored there. `uniform_share` of the numbers become levels uniform in [least, 1] instead: one number decides both,
    so numbers that are evenly spread give levels that are.
    """
    drawn = torch.from_numpy(np.asarray(uniform, dtype=np.float64))
    normal = torch.special.ndtri((drawn - uniform_share) / (1 - uniform_share))  # NaN below the share, not read there
    low, high = (torch.sigmoid(torch.tensor(mu + tail, dtype=torch.float64)) for tail in (-2.5758, 3.0902))
    stretched = (torch.sigmoid(mu + normal) - low) / (high - low)
    stretched = torch.where(stretched >= least, stretched, 2 * least - stretched).clamp(0, 1)
    even = least + (1 - least) * drawn / uniform_share  # not read at or above the share
    return torch.where(drawn < uniform_share, even, stretched).float()


def ltx2_scheduler_config(*, num_tokens: int) -> dict[str, Any]:
    """The released scheduler settings of LTX-2 for a clip of so many video tokens, as diffusers' schedulers take them.

    flow_shift, for schedulers without the shift by tokens, comes to the same shift; they end without the last level's.
    """
    mu = ltx2_mu(num_tokens)
    return {
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": math.exp(mu),
        "solver_order": 2,
        "use_dynamic_shifting": True,
        "shift_terminal": 0.1,
        "mu": mu,
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
