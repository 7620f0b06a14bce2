"""Samplers: every scheduler that is let through reaches the distribution the model knows, the others say why not."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from avlit.objectives import (
    cogvideox_alphas_cumprod,
    cogvideox_scheduler_config,
    ltx2_scheduler_config,
    wan_scheduler_config,
)
from avlit.sampling import FLOW_SCHEDULERS, V_SCHEDULERS, SchedulerError, build_scheduler, run_scheduler

MEAN, STD = 1.0, 0.5
"""Of the Gaussian clips that the ideal model below was, as it were, trained on."""


def ideal_v(latents: Tensor, alpha_bar: Tensor) -> Tensor:
    """The expected v of a noisy Gaussian clip: what a perfectly trained model predicts."""
    a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    surprise = (latents - a * MEAN) / (a**2 * STD**2 + b**2)
    noise, clean = b * surprise, MEAN + a * STD**2 * surprise
    return a * noise - b * clean


def ideal_flow(latents: Tensor, sigma: float) -> Tensor:
    surprise = (latents - (1 - sigma) * MEAN) / ((1 - sigma) ** 2 * STD**2 + sigma**2)
    noise, clean = sigma * surprise, MEAN + (1 - sigma) * STD**2 * surprise
    return noise - clean


def sample_ideal(name: str, settings: dict[str, Any], *, steps: int) -> Tensor:
    alphas = cogvideox_alphas_cumprod(snr_shift=settings.get("snr_shift_scale", 1.0))

    def predict(latents: Tensor, timestep: float) -> Tensor:
        if settings["prediction_type"] == "v_prediction":
            return ideal_v(latents, alphas[round(timestep)])
        return ideal_flow(latents, timestep / 1000)

    scheduler = build_scheduler(name, settings, steps=steps)
    noise = torch.randn(1, 10000, generator=torch.Generator().manual_seed(0))
    return run_scheduler(predict, noise=noise, scheduler=scheduler, generators=[torch.Generator().manual_seed(1)])


@pytest.mark.parametrize("snr_shift", [1.0, 3.0])
@pytest.mark.parametrize("name", V_SCHEDULERS)
def test_schedulers_sample_what_a_v_model_knows(name: str, snr_shift: float) -> None:
    samples = sample_ideal(name, cogvideox_scheduler_config(snr_shift=snr_shift), steps=500)
    assert samples.mean() == pytest.approx(MEAN, abs=0.03)
    assert samples.std() == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_schedulers_sample_what_a_flow_model_knows(name: str) -> None:
    samples = sample_ideal(name, wan_scheduler_config(shift=5.0), steps=200)
    assert samples.mean() == pytest.approx(MEAN, abs=0.03)
    assert samples.std() == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_schedulers_sample_what_a_flow_shifted_by_tokens_knows(name: str) -> None:
    samples = sample_ideal(name, ltx2_scheduler_config(num_tokens=1024), steps=200)
    assert samples.mean() == pytest.approx(MEAN, abs=0.03)
    assert samples.std() == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("num_tokens", [256, 2688, 6144])
def test_ltx2s_noise_levels_are_those_of_its_pipeline(num_tokens: int) -> None:
    from diffusers.pipelines.ltx2.pipeline_ltx2 import calculate_shift
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    stock: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    mu = calculate_shift(num_tokens, 1024, 4096, 0.95, 2.05)
    stock.set_timesteps(sigmas=np.linspace(1.0, 1 / 40, 40), mu=mu)
    settings = ltx2_scheduler_config(num_tokens=num_tokens)
    ours = build_scheduler("FlowMatchEulerDiscreteScheduler", settings, steps=40)
    torch.testing.assert_close(ours.sigmas, stock.sigmas)
    assert ours.sigmas[-2] == pytest.approx(0.1)
    one = build_scheduler("FlowMatchEulerDiscreteScheduler", settings, steps=1)
    assert one.sigmas.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("HeunDiscreteScheduler", "no zero terminal SNR"),
        ("DEISMultistepScheduler", "no zero terminal SNR"),
        ("LCMScheduler", "distilled"),
        ("DDIMInverseScheduler", "starts at timestep"),
        ("FlowMatchEulerDiscreteScheduler", "cannot be told that the model predicts v"),
        ("DDIMSheduler", "did you mean DDIMScheduler?"),
    ],
)
def test_a_scheduler_that_does_not_fit_a_v_model_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(SchedulerError, match=rf"sample\.scheduler={name}: .*") as caught:
        build_scheduler(name, cogvideox_scheduler_config(), steps=5)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("DDIMScheduler", "velocity of a shifted flow"), ("DEISMultistepScheduler", "noise level 1.000 to 0.")],
)
def test_a_scheduler_that_does_not_fit_a_flow_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(SchedulerError) as caught:
        build_scheduler(name, wan_scheduler_config(shift=5.0), steps=5)
    assert reason in str(caught.value) and "UniPCMultistepScheduler" in str(caught.value)


@pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler"])
def test_more_steps_than_noise_levels_are_refused(name: str) -> None:
    with pytest.raises(SchedulerError, match=r"sample\.steps=2000"):
        build_scheduler(name, cogvideox_scheduler_config(), steps=2000)


def test_every_step_is_told_and_may_end_the_sampling() -> None:
    calls = []

    def stop_at_three() -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            raise InterruptedError

    scheduler = build_scheduler("DDIMScheduler", cogvideox_scheduler_config(), steps=5)
    generators = [torch.Generator()]
    noise = torch.zeros(1, 4)
    run_scheduler(lambda x, _: x, noise=noise, scheduler=scheduler, generators=generators, on_step=lambda: None)
    with pytest.raises(InterruptedError):
        run_scheduler(lambda x, _: x, noise=noise, scheduler=scheduler, generators=generators, on_step=stop_at_three)
    assert calls == [0, 1, 2]


def test_a_clip_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    """SDE samplers add noise; each clip's comes from its own generator."""
    settings, noise = cogvideox_scheduler_config(), torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    alphas = cogvideox_alphas_cumprod()

    def sample(rows: list[int]) -> Tensor:
        return run_scheduler(
            lambda x, t: ideal_v(x, alphas[t]),
            noise=noise[rows],
            scheduler=build_scheduler("CogVideoXDPMScheduler", settings, steps=5),
            generators=[torch.Generator().manual_seed(row) for row in rows],
        )

    assert torch.equal(sample([0, 1])[1:], sample([1]))
