"""Noising, targets and losses against diffusers' schedulers and independent computations."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpm_cogvideox import CogVideoXDPMScheduler

from avlit.objectives import (
    Losses,
    cogvideox_alphas_cumprod,
    cogvideox_scheduler_config,
    diffuse,
    ltx2_mu,
    mean_squared_error,
    shifted_logit_normal,
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


def test_a_planned_schedule_has_no_numbers_whatever_loaded_before_has_done_to_linspace():
    from transformers.initialization import meta_device_safe_creation_ops

    with torch.device("meta"), meta_device_safe_creation_ops():  # which is on in every `from_pretrained`
        assert cogvideox_alphas_cumprod().is_meta


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


@pytest.mark.parametrize("num_tokens", [256, 1024, 2688, 4096])
def test_noise_levels_are_distributed_as_ltx2s_trainer_draws_them(num_tokens: int):
    mu = ltx2_mu(num_tokens)
    assert mu == pytest.approx(np.interp(num_tokens, [-2048, 1024, 4096], [-0.15, 0.95, 2.05]))
    rng = np.random.default_rng(0)
    count, least = 400_000, 1e-3

    def sigmoid(x: Any) -> Any:
        return 1 / (1 + np.exp(-x))

    raw = sigmoid(rng.standard_normal(count) + mu)  # the trainer draws three numbers for a level
    low, high = sigmoid(mu - 2.5758), sigmoid(mu + 3.0902)
    raw = (raw - low) / (high - low)
    expected = np.clip(np.where(raw >= least, raw, 2 * least - raw), 0, 1)
    expected = np.where(rng.random(count) < 0.1, least + (1 - least) * rng.random(count), expected)
    found = shifted_logit_normal((np.arange(100_000) + 0.5) / 100_000, mu=mu).numpy()
    places = np.linspace(0.001, 0.999, 200)
    np.testing.assert_allclose(np.quantile(found, places), np.quantile(expected, places), atol=0.008)


def test_any_uniform_number_gives_a_noise_level_and_evenly_spread_ones_give_spread_levels():
    edges = shifted_logit_normal(np.array([0.0, 0.1 - 1e-12, 0.1, 0.1 + 1e-12, 1 - 1e-16]), mu=0.95)
    assert bool(((edges >= 0) & (edges <= 1)).all())
    even = shifted_logit_normal((np.arange(20) + 0.5) / 20, mu=0.95)
    assert even.unique().numel() == 20 and even[:2].tolist() == pytest.approx([0.25075, 0.75025])
