"""Noising, targets and losses against diffusers' schedulers and independent computations."""

from typing import Any

import torch
from diffusers.schedulers.scheduling_dpm_cogvideox import CogVideoXDPMScheduler

from avlit.objectives import (
    Losses,
    cogvideox_alphas_cumprod,
    cogvideox_scheduler_config,
    diffuse,
    mean_squared_error,
    velocity,
)

GENERATOR_SEED = 7


def pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    clean, noise = torch.randn(2, 3, 4, 5, 6, 6, generator=generator)
    return clean, noise, torch.tensor([0, 500, 999])


def test_noising_and_velocity_equal_those_of_diffusers():
    clean, noise, timestep = pair()
    for snr_shift in (1.0, 3.0):
        alpha_bar = cogvideox_alphas_cumprod(snr_shift=snr_shift)[timestep]
        scheduler: Any = CogVideoXDPMScheduler(**cogvideox_scheduler_config(snr_shift=snr_shift))
        torch.testing.assert_close(diffuse(clean, noise, alpha_bar), scheduler.add_noise(clean, noise, timestep))
        torch.testing.assert_close(velocity(clean, noise, alpha_bar), scheduler.get_velocity(clean, noise, timestep))


def test_the_last_noise_level_holds_no_signal():
    assert cogvideox_alphas_cumprod()[-1] == 0
    assert cogvideox_alphas_cumprod()[0] > 0.999


def test_v_loss_equals_the_weighted_clean_loss_of_the_papers_trainer():
    clean, noise, timestep = pair()
    timestep[-1] = 998  # at zero SNR the two forms agree in the limit only
    alpha_bar = cogvideox_alphas_cumprod()[timestep].view(-1, 1, 1, 1, 1).double()
    clean, noise = clean.double(), noise.double()
    noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
    pred = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pred_clean = alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * pred
    weighted = ((pred_clean - clean).square() / (1 - alpha_bar)).flatten(1).mean(1)
    target = velocity(clean, noise, alpha_bar.flatten())
    torch.testing.assert_close(mean_squared_error(pred, target), weighted.float(), rtol=1e-4, atol=1e-6)


def test_masked_loss_is_the_mean_over_what_the_mask_keeps():
    clean, noise, _ = pair()
    mask = torch.zeros(3, 1, 5, 1, 1, dtype=torch.bool)
    mask[0, :, 1:3] = True
    mask[1, :, 4] = True
    loss = mean_squared_error(clean, noise, mask=mask)
    torch.testing.assert_close(loss[0], (clean - noise)[0, :, 1:3].square().mean())
    torch.testing.assert_close(loss[1], (clean - noise)[1, :, 4].square().mean())
    assert loss[2] == 0


def test_total_is_the_weighted_sum_of_the_parts():
    losses = Losses(
        parts={"video": torch.tensor([1.0, 3.0]), "audio": torch.tensor([10.0, 20.0])},
        noise_level=torch.zeros(2),
        weights={"audio": 0.5},
    )
    assert losses.total == 2.0 + 0.5 * 15.0
