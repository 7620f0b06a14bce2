"""From noise to latents: diffusers' schedulers by name, and guidance."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from avlit.errors import UserError
from avlit.settings import nearest


class SchedulerError(UserError):
    """An unknown scheduler name; the message has the nearest one."""


def build_scheduler(name: str, settings: dict[str, Any], *, steps: int, device: torch.device | str = "cpu"):
    """The diffusers scheduler class `name` with `settings` (those that the class knows), set to `steps` steps."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    known_names = [known for known in dir(diffusers) if known.endswith("Scheduler")]
    cls: Any = getattr(diffusers, name) if name in known_names else None
    if not isinstance(cls, type) or not issubclass(cls, SchedulerMixin):
        near = nearest(name, known_names) or "CogVideoXDPMScheduler"
        raise SchedulerError(f"sample.scheduler={name}: no scheduler of diffusers has this name; did you mean {near}?")
    known = inspect.signature(cls.__init__).parameters
    scheduler: Any = cls(**{key: value for key, value in settings.items() if key in known})
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: uncond + scale * (cond - uncond)."""
    return unconditional + scale * (conditional - unconditional)


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
    latents = noise * scheduler.init_noise_sigma
    previous_clean = None
    timesteps = scheduler.timesteps.tolist()
    takes_generators = "generator" in inspect.signature(scheduler.step).parameters
    for index, timestep in enumerate(timesteps):
        output = predict(scheduler.scale_model_input(latents, timestep), timestep)
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
