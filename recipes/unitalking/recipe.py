"""UniTalking's training step and sampler: speech and a talking portrait together (arXiv 2603.01418)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avlit.batch import AVBatch
from avlit.codecs.pretrained import fingerprint
from avlit.conditioning import give_frames, kept
from avlit.config import ConfigError, SampleConfig
from avlit.models.joint_attention import Mode
from avlit.models.twin_wan import TwinWan, load_released, twin_trainable
from avlit.module import AVModule
from avlit.objectives import (
    Losses,
    flow_diffuse,
    flow_velocity,
    mean_squared_error,
    unipc_sigma,
    wan_scheduler_config,
)
from avlit.randomness import Draws
from avlit.sampling import Latents, build_scheduler, guide, run_scheduler, start_noise
from avlit.timing import audio_latents_of
from data.encode import Encoders
from recipes.unitalking.config import WITHOUT_REFERENCE, UniTalkingConfig, UniTalkingSample


class UniTalking(AVModule):
    """Twin Wan transformers, trained to predict the flow's velocity of video and sound (UniTalking, Section 4)."""

    model: TwinWan

    def __init__(self, config: UniTalkingConfig, *, start_step: int = 0):
        # Drawing a video twin that released weights then fill would take 20 GB and minutes at the paper's size.
        model = TwinWan(config.model, seed=config.seed, draws_video=config.model.weights is None)
        super().__init__(
            model, optimizer=config.optimizer, steps=config.train.steps, seed=config.seed, start_step=start_step
        )
        self.config = config

    def freeze(self) -> None:
        """Leave trainable what `model.trainable` names (UniTalking, Section 4.5)."""
        trained = set(twin_trainable(self.model, which=self.config.model.trainable))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)

    def load_released(self, folder: str) -> str:
        """Read Wan's transformer from a released diffusers folder into the video twin."""
        report = load_released(self.model, folder)
        self.model.float()  # a folder's bfloat16 would lose small updates; what stays frozen is lowered again
        self.released = frozenset(report.loaded)
        self.base_model = fingerprint(Path(report.folder).glob("*.safetensors"))
        return str(report)

    def check_encoders(self, encoders: Encoders) -> None:
        """Raise ConfigError where the twins' sizes do not fit what the codecs make."""
        model, audio, video = self.config.model, encoders.audio, encoders.video
        made = [("text_dim", model.text_dim, encoders.text.dim, "numbers of a text token")]
        if audio is not None:
            made.append(("audio_channels", model.audio_channels, audio.channels, "channels of the audio codec"))
        if video is not None:
            made.append(("video_channels", model.video_channels, video.channels, "channels of the video codec"))
            for name, cells in zip(("height", "width"), self.config.timing.latent_size, strict=True):
                if cells % model.patch_size:
                    raise ConfigError(
                        f"model.patch_size={model.patch_size}: must divide the {cells} latent cells of data.{name}"
                    )
        for key, value, found, what in made:
            if value != found:
                raise ConfigError(f"model.{key}={value}: must be {found}, the {what}")
        if model.max_text_tokens < encoders.text.max_tokens:
            raise ConfigError(
                f"model.max_text_tokens={model.max_text_tokens}: must be at least {encoders.text.max_tokens}, the most "
                "tokens that the text encoder makes"
            )

    def joint_conditions(self, batch: AVBatch) -> dict[str, Any] | None:
        """Text, and the reference where a clip has one."""
        if batch.video_latents is None:
            return None
        return {"text": batch.text, "reference": batch.reference if any(batch.has_reference) else None}

    @property
    def tasks(self) -> tuple[str, ...]:
        """What clips take turns with, and what those without a reference do instead."""
        names = self.config.tasks.weights
        return tuple(dict.fromkeys([*names, *(WITHOUT_REFERENCE[name] for name in names if name in WITHOUT_REFERENCE)]))

    @property
    def tokens_per_sample(self) -> int:
        """Video and audio tokens of the configured clip; text is attended to apart."""
        config, timing = self.config, self.config.timing
        video = 0 if config.codecs.video == "none" else timing.video_tokens(config.model.patch_size)
        return video + audio_latents_of(config.codecs.audio, timing.duration_s)

    def step(self, batch: AVBatch, draws: Draws) -> Losses:
        """Noise video and sound alike, predict both velocities under each clip's task, compare (UniTalking, Eq. 1)."""
        video, audio = batch.video_latents, batch.audio_latents  # [B, C, T, h, w], [B, L, C]
        assert audio is not None
        tasks = self._tasks(batch, draws)
        text, reference = self._conditions(batch, draws, tasks)
        sigma = unipc_sigma(draws.times(), shift=self.config.flow_shift).to(audio.device, non_blocking=True)  # [B]
        audio_noise = draws.normal("audio noise", audio)
        noisy_audio = flow_diffuse(audio, audio_noise, sigma)
        if video is None:
            pred = self.model(
                None,
                noisy_audio,
                text=text,
                audio_timestep=1000 * sigma,
                reference=reference,
                num_frames=self._num_frames(batch),
            )
            loss = mean_squared_error(pred.audio, flow_velocity(audio, audio_noise))  # [B]
            return Losses(parts={"audio": loss}, noise_level=sigma, tasks=tasks)
        video_noise = draws.normal("video noise", video)
        given = self._given_frames(draws, tasks, like=video)  # [B, T]
        noisy_video, video_timestep = give_frames(flow_diffuse(video, video_noise, sigma), video, 1000 * sigma, given)
        modes: list[Mode] = ["one-way" if task == "tv2a" else "joint" for task in tasks]
        pred = self.model(
            noisy_video,
            noisy_audio,
            text=text,
            video_timestep=video_timestep,
            audio_timestep=1000 * sigma,
            reference=reference,
            mode=modes,
        )
        made = ~given[:, None, :, None, None]  # [B, 1, T, 1, 1]: given frames are not supervised, all of them in tv2a
        return Losses(
            parts={
                "video": mean_squared_error(pred.video, flow_velocity(video, video_noise), mask=made),  # [B]
                "audio": mean_squared_error(pred.audio, flow_velocity(audio, audio_noise)),  # [B]
            },
            noise_level=sigma,
            applies={"video": tuple(task != "tv2a" for task in tasks)},
            tasks=tasks,
        )

    def _tasks(self, batch: AVBatch, draws: Draws) -> tuple[str, ...]:
        """Each clip's task; one with a reference becomes the one without where the clip has none."""
        turns = draws.turns("task", self.config.tasks.weights)
        return tuple(
            task if has_reference else WITHOUT_REFERENCE.get(task, task)
            for task, has_reference in zip(turns, batch.has_reference, strict=True)
        )

    def _conditions(self, batch: AVBatch, draws: Draws, tasks: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Text [B, L, D] and reference [B, R, C], zeros where a clip's task has none or the condition is dropped."""
        text = kept(batch.text, ~draws.happens("drop text", self.config.dropout.text))
        has_reference = np.array([task in WITHOUT_REFERENCE for task in tasks])
        has_reference &= ~draws.happens("drop reference", self.config.dropout.reference)
        if batch.reference is None or not has_reference.any():
            return text, None
        return text, kept(batch.reference, has_reference)

    def _given_frames(self, draws: Draws, tasks: Sequence[str], *, like: Tensor) -> Tensor:
        """Latent frames that a task gives clean, bool [B, T]: all in tv2a, the first in ti2av."""
        given = np.zeros((len(tasks), like.shape[2]), dtype=bool)
        given[:, 0] = np.array([task == "ti2av" for task in tasks])
        given[:, 0] &= ~draws.happens("drop image", self.config.dropout.image)
        given[np.array([task == "tv2a" for task in tasks])] = True
        return torch.from_numpy(given).to(like.device, non_blocking=True)

    def _num_frames(self, batch: AVBatch) -> float:
        """Latent frames of video that the batch's sound would belong to, by the configured clip's."""
        timing = self.config.timing
        return timing.latent_frames * batch.duration_s / timing.duration_s

    @property
    def scheduler_settings(self) -> dict[str, Any]:
        """UniPC as Wan sets it."""
        return wan_scheduler_config(shift=self.config.flow_shift)

    @torch.no_grad()
    def sample(
        self,
        batch: AVBatch,
        *,
        seeds: Sequence[int],
        settings: SampleConfig,
        keyframes: Tensor | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Latents:
        """Video and sound, or sound alone, for the batch's text and, of clips that have one, the reference.

        keyframes: no frame given is T2AV, the first TI2AV, all of them TV2A; with a reference TR2AV. Guidance contrasts
        text and reference with neither, each modality with its own scale (UniTalking, Eq. 2); given frames are given in
        both passes (chosen, as Wan).
        """
        assert isinstance(settings, UniTalkingSample) and batch.audio_latents is not None
        given = Latents(video=batch.video_latents, audio=batch.audio_latents)
        sampler = build_scheduler(
            settings.scheduler, self.scheduler_settings, steps=settings.steps, device=batch.audio_latents.device
        )
        noise = Latents(
            video=None if given.video is None else start_noise(seeds, given.video, "video"),
            audio=start_noise(seeds, batch.audio_latents, "audio"),
        )
        nothing = torch.zeros_like(batch.text)
        reference = batch.reference if any(batch.has_reference) else None
        passes: list[tuple[Tensor, Tensor | None]] = [(nothing, None), (batch.text, reference)]
        is_dubbed = [False] * len(batch) if keyframes is None else keyframes.all(1).tolist()
        makes_video = given.video is not None and not all(is_dubbed)
        scales = {"video": [settings.guidance if makes_video else 1.0], "audio": [settings.audio_guidance]}
        if reference is not None and settings.reference_guidance is not None:
            passes.insert(1, (batch.text, None))
            scales = {
                "video": scales["video"] * 2,
                "audio": [settings.audio_guidance, settings.reference_guidance],
            }
        modes: list[Mode] = ["one-way" if each else "joint" for each in is_dubbed]
        if all(scale == 1.0 for each in scales.values() for scale in each):
            passes, scales = passes[-1:], {"video": [], "audio": []}

        def predict(packed: Tensor, timestep: int) -> Tensor:
            noisy = noise.unpack(packed)
            found = [self._velocities(batch, noisy, timestep, keyframes, modes, *conditions) for conditions in passes]
            return Latents(
                video=None if noisy.video is None else guide([each.video for each in found], scales["video"]),
                audio=guide([each.audio for each in found], scales["audio"]),
            ).pack()

        generators = [torch.Generator(device=batch.audio_latents.device).manual_seed(seed) for seed in seeds]
        packed = run_scheduler(predict, noise=noise.pack(), scheduler=sampler, generators=generators, on_step=on_step)
        made = noise.unpack(packed)
        if given.video is None or made.video is None or keyframes is None:
            return made
        return Latents(video=torch.where(keyframes[:, None, :, None, None], given.video, made.video), audio=made.audio)

    def _velocities(
        self,
        batch: AVBatch,
        noisy: Latents,
        timestep: int,
        keyframes: Tensor | None,
        modes: list[Mode],
        text: Tensor,
        reference: Tensor | None,
    ) -> Any:
        """One pass of the sampler's model."""
        assert noisy.audio is not None
        times = torch.full((len(batch),), float(timestep), device=noisy.audio.device)
        if noisy.video is None or batch.video_latents is None:
            return self.model(
                None,
                noisy.audio,
                text=text,
                audio_timestep=times,
                reference=reference,
                num_frames=self._num_frames(batch),
            )
        video, video_times = noisy.video, times
        if keyframes is not None:
            video, video_times = give_frames(video, batch.video_latents, times, keyframes)
        return self.model(
            video,
            noisy.audio,
            text=text,
            video_timestep=video_times,
            audio_timestep=times,
            reference=reference,
            mode=modes,
        )


build = UniTalking
"""What `just train` calls: config -> module."""
