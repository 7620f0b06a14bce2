"""From noise to latents: diffusers' schedulers by name, and guidance."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avlit.errors import UserError
from avlit.objectives import cogvideox_alphas_cumprod
from avlit.randomness import numpy_generator
from avlit.settings import nearest

FLOW_EULER = "FlowMatchEulerDiscreteScheduler"
V_SCHEDULERS = (
    "CogVideoXDPMScheduler", "CogVideoXDDIMScheduler", "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
)  # fmt: skip
FLOW_SCHEDULERS = (
    "UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", FLOW_EULER,
)  # fmt: skip
"""Tried on a model whose samples are known, as the tests do; others are taken where they pass the same checks."""
DYNAMIC = ("use_dynamic_shifting", "shift_terminal")
"""Settings that FLOW_EULER alone is given; the others are told the same shift as a number."""


@dataclass(frozen=True)
class Latents:
    """What was generated: video [B, C, T, h, w] and audio [B, L, C]; None is what the recipe does not make."""

    video: Tensor | None = None
    audio: Tensor | None = None

    def pack(self) -> Tensor:
        """All in one [B, n], so that one sampler takes them through the same noise levels."""
        return torch.cat([each.flatten(1) for each in (self.video, self.audio) if each is not None], dim=1)

    def unpack(self, packed: Tensor) -> "Latents":
        """The inverse of `pack` for latents of these shapes."""
        sizes = [0 if each is None else each[0].numel() for each in (self.video, self.audio)]
        parts = packed.split(sizes, dim=1)
        return Latents(
            *(
                None if like is None else part.view(like.shape)
                for like, part in zip((self.video, self.audio), parts, strict=True)
            )
        )


class SchedulerError(UserError):
    """A scheduler that diffusers does not have, or that cannot sample what the model predicts; the message says why."""


def build_scheduler(name: str, settings: dict[str, Any], *, steps: int, device: torch.device | str = "cpu"):
    """The diffusers scheduler class `name`, set to `steps` steps, with the noise levels that `settings` describe.

    settings: as `objectives` gives them for CogVideoX (v, shifted noise schedule, zero terminal SNR), Wan (flow) or
    LTX-2 (flow, shifted by the clip's tokens); empty ones leave the class at its own defaults, unchecked.
    A class without a word for the shift gets the shifted betas themselves. SchedulerError for a class that would sample
    with other noise levels, another prediction, or from another start than pure noise.
    """
    cls = _scheduler_class(name)
    known = inspect.signature(cls.__init__).parameters
    predicted = settings.get("prediction_type")
    if problem := _unsuited(cls, known, settings):
        raise SchedulerError(f"sample.scheduler={name}: {problem}; {_suited(settings)}")
    alphas = None
    if predicted == "v_prediction":
        alphas = cogvideox_alphas_cumprod(snr_shift=settings["snr_shift_scale"])
        if "snr_shift_scale" not in known and settings["snr_shift_scale"] != 1:
            steps_down = alphas.double().clone()
            steps_down[1:] /= alphas.double()[:-1]
            settings = {key: value for key, value in settings.items() if not key.startswith("beta_")}
            settings["trained_betas"] = (1 - steps_down).tolist()
    levels: dict[str, Any] = {}
    if "mu" in settings and name == FLOW_EULER:  # as LTX2Pipeline calls it
        levels = {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": settings["mu"]}
        if steps == 1:  # a last level that is the first cannot be moved
            settings = {**settings, "shift_terminal": None}
    elif "mu" in settings:
        settings = {key: value for key, value in settings.items() if key not in DYNAMIC}
    scheduler: Any = cls(**{key: value for key, value in settings.items() if key in known})
    try:
        scheduler.set_timesteps(steps, device=device, **levels)
    except (ValueError, IndexError) as error:
        raise SchedulerError(f"sample.steps={steps}: {name} cannot take so many steps: {error}") from error
    if len(scheduler.timesteps.unique()) < steps:
        raise SchedulerError(f"sample.steps={steps}: {name} has {len(scheduler.timesteps.unique())} different steps")
    if predicted and (problem := _misses(scheduler, alphas)):
        raise SchedulerError(f"sample.scheduler={name}: {problem}; {_suited(settings)}")
    return scheduler


def _scheduler_class(name: str) -> Any:
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    names = [known for known in dir(diffusers) if known.endswith("Scheduler")]
    cls: Any = getattr(diffusers, name) if name in names else None
    if not isinstance(cls, type) or not issubclass(cls, SchedulerMixin):
        near = nearest(name, [known for known in names if known != name]) or "CogVideoXDPMScheduler"
        raise SchedulerError(f"sample.scheduler={name}: no scheduler of diffusers has this name; did you mean {near}?")
    return cls


def _unsuited(cls: type, known: Mapping[str, object], settings: dict[str, Any]) -> str | None:
    """Why a class cannot be told what the model predicts; None if it can."""
    predicted = settings.get("prediction_type")
    if "original_inference_steps" in known:
        return "it is for models that were distilled for it"
    if predicted == "v_prediction":
        if "prediction_type" not in known:
            return "it cannot be told that the model predicts v"
        if "rescale_betas_zero_snr" not in known:
            return "it cannot start from pure noise (it has no zero terminal SNR)"
    elif (
        predicted
        and cls.__name__ != FLOW_EULER
        and not {"prediction_type", "use_flow_sigmas", "flow_shift"} <= known.keys()
    ):
        return "it cannot be told that the model predicts the velocity of a shifted flow"
    return None


def _misses(scheduler: Any, alphas: Tensor | None) -> str | None:
    """Where a built scheduler departs from the noise levels the model was trained on; None if it does not.

    alphas [1000]: the trained noise schedule; None for a flow.
    """
    if alphas is None:
        if float(scheduler.sigmas[-1]) != 0 or float(scheduler.sigmas[0]) < 0.99:
            return f"it goes from noise level {float(scheduler.sigmas[0]):.3f} to {float(scheduler.sigmas[-1]):.3f}"
    elif not torch.allclose(scheduler.alphas_cumprod.float().cpu(), alphas, rtol=1e-3, atol=1e-6):
        return "its noise schedule is not the one that the model was trained with"
    elif int(scheduler.timesteps[0]) != len(alphas) - 1:
        return f"it starts at timestep {int(scheduler.timesteps[0])}, not at pure noise"
    return None


def _suited(settings: dict[str, Any]) -> str:
    suited = FLOW_SCHEDULERS if settings.get("prediction_type") == "flow_prediction" else V_SCHEDULERS
    return f"for this model use one of {', '.join(suited)}"


def guide(predictions: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """Classifier-free guidance with one condition after the other (UniTalking, Eq. 2, for one).

    predictions: of the model with no condition, with the first, with the first two, ...; scales: the weight of what
    each condition adds to the ones before. v = v_0 + s_1 (v_1 - v_0) + s_2 (v_2 - v_1) + ...
    """
    guided = predictions[0]
    for before, after, scale in zip(predictions[:-1], predictions[1:], scales, strict=True):
        guided = guided + scale * (after - before)
    return guided


def start_noise(seeds: Sequence[int], like: Tensor, name: str = "sample") -> Tensor:
    """Standard normal noise of the shape and device of `like` [B, ...], row i from `seeds[i]` and `name` alone."""
    rows = [numpy_generator(seed, name).standard_normal(like.shape[1:], dtype="float32") for seed in seeds]
    return torch.stack([torch.from_numpy(row) for row in rows]).to(like.device)


def run_scheduler(
    predict: Callable[[Tensor, int], Tensor],
    *,
    noise: Tensor,
    scheduler,
    generators: Sequence[torch.Generator],
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Denoise `noise` [B, ...] to clean latents of the same shape.

    predict: (latents, timestep) -> the model's output, guidance included. generators: one for each clip, for the
    noise that SDE samplers add, so that a clip does not depend on the others in its batch. on_step: called after every
    step; what it raises ends the sampling.
    """
    # flow-matching Euler has neither of the two: its noise has variance 1, its input is not scaled
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    scale_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    previous_clean = None
    timesteps = scheduler.timesteps.tolist()
    takes_generators = "generator" in inspect.signature(scheduler.step).parameters
    for index, timestep in enumerate(timesteps):
        output = predict(scale_input(latents, timestep), timestep)
        if type(scheduler).__name__ == "CogVideoXDPMScheduler":  # its two-step rule is told the steps from outside
            back = timesteps[index - 1] if index else None
            step = scheduler.step(
                output, previous_clean, timestep, back, latents, generator=list(generators), return_dict=False
            )
            latents, previous_clean = step
        elif takes_generators:
            latents = scheduler.step(output, timestep, latents, generator=list(generators), return_dict=False)[0]
        else:
            latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        latents = latents.to(noise.dtype)
        if on_step is not None:
            on_step()
    return latents
