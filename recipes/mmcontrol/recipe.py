"""MMControl's training step and sampler: a frozen LTX-2 controlled by image, voice, depth and pose (arXiv 2604.19679).

Of a clip, N = T * h * w video tokens and L audio tokens are generated. R reference images (one latent frame) and P
latents of a reference voice lead them, whatever a clip has, so that a clip does not depend on the others of its batch.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avlit.batch import AVBatch
from avlit.codecs.gemma import load_text_connectors
from avlit.codecs.pretrained import fingerprint
from avlit.conditioning import kept
from avlit.config import ConfigError, SampleConfig
from avlit.models.bypass import BypassLTX2, bypass_trainable
from avlit.models.control_unit import Control
from avlit.models.ltx2_backbone import LatentGrid
from avlit.models.pretrained import load_backbone
from avlit.module import AVModule
from avlit.objectives import (
    Losses,
    flow_diffuse,
    flow_velocity,
    ltx2_mu,
    ltx2_scheduler_config,
    mean_squared_error,
    shifted_logit_normal,
)
from avlit.randomness import Draws
from avlit.sampling import Latents, build_scheduler, guide, run_scheduler, start_noise
from avlit.timing import AUDIO_LATENTS_PER_S, VIDEO_FACTORS, audio_latents_of
from data.encode import Encoders
from recipes.mmcontrol.config import MMControlConfig, MMControlSample
from recipes.mmcontrol.controls import Controls, Given, led, present, supervised
from recipes.mmcontrol.two_stage import build_refiner

__all__ = ["MMControl", "build", "build_refiner"]


class MMControl(AVModule):
    """LTX-2 with a dual-stream bypass, trained to predict the flow's velocity (MMControl, Section 3)."""

    model: BypassLTX2

    def __init__(self, config: MMControlConfig, *, start_step: int = 0):
        # Drawing 19 B weights that released ones then replace would take 76 GB and minutes.
        with torch.device("cpu" if config.model.weights is None else "meta"):
            model = BypassLTX2(config.model, seed=config.seed)
        if config.has_controls and config.model.weights is None:
            model.add_bypass(seed=config.seed)
        super().__init__(
            model, optimizer=config.optimizer, steps=config.train.steps, seed=config.seed, start_step=start_step
        )
        self.config = config
        self.connectors = None  # beside the model, so that no checkpoint holds them
        if config.codecs.text == "gemma":
            self.connectors = load_text_connectors(Path(config.codecs.text_weights or ""), dtype=self.frozen_dtype)
        self.grid = _grid(config)
        self.controls = Controls(config, self.grid)

    @property
    def frozen_dtype(self) -> torch.dtype:
        """The folder's where the run computes in bf16, which is LTX-2's own."""
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    def freeze(self) -> None:
        """Leave trainable what `model.trainable` names: the backbone alone, or the bypass alone (MMControl, 3.3)."""
        trained = set(bypass_trainable(self.model, which=self.config.model.trainable))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)

    def load_released(self, folder: str) -> str:
        """Read LTX-2's transformer from a released diffusers folder, and copy the bypass from it.

        A frozen backbone stays in the folder's precision where the run computes in bf16; what trains is float32.
        """
        report = load_backbone(self.model, folder)
        if not self.config.has_controls or self.frozen_dtype == torch.float32:
            self.model.backbone.float()
        self.released = frozenset(report.loaded)
        self.base_model = fingerprint(Path(report.folder).glob("*.safetensors"))
        if self.config.has_controls:
            self._add_bypass()
        return str(report)

    @property
    def base_names(self) -> frozenset[str]:
        """The frozen backbone, which the bypass stands on."""
        if not self.config.has_controls:
            return frozenset()
        return frozenset(name for name in self.model.state_dict() if name.startswith("backbone."))

    def copy_weights(self, inherited: frozenset[str], trained: frozenset[str]) -> str:
        """Start the bypass as a copy of the backbone, unless it came with `init=` (MMControl, 3.3).

        ConfigError: the backbone is untrained.
        """
        if not self.config.has_controls:
            return ""
        if not self.base_model and not self.base_names <= inherited:
            raise ConfigError(
                "recipe=mmcontrol: needs a trained backbone; give init=RUN of recipe=mmcontrol_backbone, or released "
                "weights as model.weights=FOLDER (`just curriculum recipe=mmcontrol` trains both)"
            )
        if any(name.startswith("bypass.") for name in inherited):
            return ""
        self._add_bypass()
        return f"The bypass starts as a copy of layers {', '.join(map(str, self.config.model.bypass_layers))}"

    def _add_bypass(self) -> None:
        self.model.add_bypass(seed=self.seed)
        assert self.model.bypass is not None
        self.model.bypass.float()

    def check_encoders(self, encoders: Encoders) -> None:
        """Raise ConfigError where the backbone's sizes do not fit what the codecs make."""
        model, stages = self.config.model, self.config.sample.stages
        assert encoders.video is not None and encoders.audio is not None
        if stages != "first":
            raise ConfigError(
                f"sample.stages={stages}: a training's own clips are of its size; give it to `just sample` instead"
            )
        for key, value, found, what in (
            ("text_dim", model.text_dim, encoders.text.dim, "numbers of a text token"),
            ("video_channels", model.video_channels, encoders.video.channels, "channels of the video codec"),
            ("audio_channels", model.audio_channels, encoders.audio.channels, "channels of the audio codec"),
        ):
            if value != found:
                raise ConfigError(f"model.{key}={value}: must be {found}, the {what}")

    @property
    def tasks(self) -> tuple[str, ...]:
        """What clips take turns with."""
        return tuple(self.config.tasks.weights) if self.config.has_controls else ()

    @property
    def tokens_per_sample(self) -> int:
        """Video and audio tokens of the configured clip and its references; text is attended to apart."""
        timing, config = self.config.timing, self.config
        clip = timing.video_tokens(1) + audio_latents_of(config.codecs.audio, timing.duration_s)
        if not config.has_controls:
            return clip
        return clip + timing.latent_size[0] * timing.latent_size[1] + config.reference_tokens

    def step(self, batch: AVBatch, draws: Draws) -> Losses:
        """Noise video, sound and references alike, predict the velocities under controls, compare (MMControl, 3.3)."""
        video, audio = batch.video_latents, batch.audio_latents  # [B, C, T, h, w], [B, L, C]
        assert video is not None and audio is not None
        mu = ltx2_mu(video[0, 0].numel())
        sigma = shifted_logit_normal(draws.times(), mu=mu).to(video.device, non_blocking=True)  # [B]
        video_noise, audio_noise = draws.normal("video noise", video), draws.normal("audio noise", audio)
        texts = self._texts(batch, ~draws.happens("drop text", self.config.dropout.text))
        control, tasks, is_video, is_audio = None, (), None, None
        if self.config.has_controls:
            tasks = tuple(draws.turns("task", self.config.tasks.weights))
            control = self.controls.unit(batch, self._drawn(batch, draws, tasks))
            is_video, is_audio = supervised(control)  # [B, 1, R + T, 1, 1], [B, P + L, 1]
            video = torch.cat((control.images, video), dim=2)  # [B, C, R + T, h, w]
            audio = torch.cat((control.voices, audio), dim=1)  # [B, P + L, C]
            video_noise = torch.cat((draws.normal("image noise", control.images), video_noise), dim=2)
            audio_noise = torch.cat((draws.normal("voice noise", control.voices), audio_noise), dim=1)
        pred = self.model(
            flow_diffuse(video, video_noise, sigma),
            flow_diffuse(audio, audio_noise, sigma),
            video_timestep=1000 * sigma,
            audio_timestep=1000 * sigma,
            grid=self.grid,
            control=control,
            **texts,
        )
        return Losses(
            parts={
                "video": mean_squared_error(pred.video, flow_velocity(video, video_noise), mask=is_video),  # [B]
                "audio": mean_squared_error(pred.audio, flow_velocity(audio, audio_noise), mask=is_audio),  # [B]
            },
            noise_level=sigma,
            tasks=tasks,
        )

    def _texts(self, batch: AVBatch, has_text: np.ndarray) -> dict[str, Tensor]:
        """What both streams attend to; the text of clips where `has_text`, bool [B], is False is a token of zeros."""
        lengths = [length if has and length else 1 for length, has in zip(batch.text_lengths, has_text, strict=True)]
        text = kept(batch.text, has_text)[:, : max(lengths)]  # [B, S, D]
        if self.connectors is not None:
            video_text, audio_text = self.connectors(text, lengths)
            return {"text": video_text, "audio_text": audio_text}
        places = torch.arange(text.shape[1])
        mask = places < torch.tensor(lengths)[:, None]  # [B, S]
        return {"text": text, "text_mask": mask.to(text.device, non_blocking=True)}

    def _drawn(self, batch: AVBatch, draws: Draws, tasks: Sequence[str]) -> Given:
        """What each clip's task gives, less what the clip lacks and what is dropped (MMControl, 4.1)."""
        names, has = np.array(tasks), present(batch)
        visual = ~draws.happens("drop visual", self.config.dropout.visual)
        acoustic = ~draws.happens("drop acoustic", self.config.dropout.acoustic)
        return Given(
            image=has.image & visual,
            voice=has.voice & (names == "audio") & acoustic,
            depth=has.depth & (names == "depth") & visual,
            pose=has.pose & (names == "pose") & visual,
        )

    @property
    def scheduler_settings(self) -> dict[str, Any]:
        """LTX-2's flow, shifted for the configured clip."""
        return ltx2_scheduler_config(num_tokens=self.config.timing.video_tokens(1))

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
        """Video and sound for the batch's text under the controls that its clips have; of depth and pose, depth.

        keyframes: None; frames cannot be given (ValueError). Guidance contrasts the text with none, each modality with
        its own scale, and both passes are controlled (chosen). References start as noise like all else and are dropped
        at the end: what is known of them comes through the hints alone.
        """
        if keyframes is not None and keyframes.any():
            raise ValueError("keyframes: MMControl takes a reference image, depth and pose, and no given frames")
        video = batch.video_latents
        assert video is not None
        control = self.control_of(batch, settings)
        scheduler = build_scheduler(
            settings.scheduler,
            ltx2_scheduler_config(num_tokens=video[0, 0].numel()),
            steps=settings.steps,
            device=video.device,
        )
        start = self.start(batch, control, seeds=seeds)
        return self.denoise(
            batch, start, control=control, scheduler=scheduler, seeds=seeds, settings=settings, on_step=on_step
        )

    def control_of(self, batch: AVBatch, settings: SampleConfig) -> Control | None:
        """All that a batch's clips are controlled by; of depth and pose, depth.

        None without a bypass, and where both scales are 0: the backbone is then left alone, its tokens included, so
        that a clip is the stock model's, bit for bit.
        """
        assert isinstance(settings, MMControlSample)
        if not self.config.has_controls or settings.visual_scale == settings.acoustic_scale == 0:
            return None
        has = present(batch)
        return self.controls.unit(batch, Given(has.image, has.voice, has.depth, has.pose & ~has.depth))

    def start(self, batch: AVBatch, control: Control | None, *, seeds: Sequence[int], stage: str = "") -> Latents:
        """Noise of the shape of the batch's clips with their references in front, each stage's its own."""
        video, audio = batch.video_latents, batch.audio_latents
        assert video is not None and audio is not None
        noise = Latents(
            video=start_noise(seeds, video, f"{stage}video"), audio=start_noise(seeds, audio, f"{stage}audio")
        )
        if control is None:
            return noise
        image = start_noise(seeds, control.images, f"{stage}image")
        return led(noise, image, start_noise(seeds, control.voices, f"{stage}voice"))

    @torch.no_grad()
    def denoise(
        self,
        batch: AVBatch,
        start: Latents,
        *,
        control: Control | None,
        scheduler: Any,
        seeds: Sequence[int],
        settings: SampleConfig,
        is_guided: bool = True,
        on_step: Callable[[], None] | None = None,
    ) -> Latents:
        """Latents at the scheduler's first noise level, references in front -> clean ones of the clips alone.

        is_guided False: one pass, with the text.
        """
        assert isinstance(settings, MMControlSample) and start.video is not None
        device = start.video.device
        all_clips = np.ones(len(batch), dtype=bool)
        passes = [self._texts(batch, ~all_clips), self._texts(batch, all_clips)]
        video_scales, audio_scales = [settings.guidance], [settings.audio_guidance]
        if not is_guided or settings.guidance == settings.audio_guidance == 1.0:
            passes, video_scales, audio_scales = passes[1:], [], []

        def predict(packed: Tensor, timestep: float) -> Tensor:
            noisy = start.unpack(packed)
            times = torch.full((len(batch),), float(timestep), device=device)
            found = [
                self.model(
                    noisy.video,
                    noisy.audio,
                    video_timestep=times,
                    audio_timestep=times,
                    grid=self.grid,
                    control=control,
                    visual_scale=settings.visual_scale,
                    acoustic_scale=settings.acoustic_scale,
                    **texts,
                )
                for texts in passes
            ]
            return Latents(
                video=guide([each.video for each in found], video_scales),
                audio=guide([each.audio for each in found], audio_scales),
            ).pack()

        generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        is_bf16 = next(self.model.backbone.parameters()).dtype == torch.bfloat16
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16):
            packed = run_scheduler(
                predict, noise=start.pack(), scheduler=scheduler, generators=generators, on_step=on_step
            )
        made = start.unpack(packed)
        assert made.video is not None and made.audio is not None
        num_images, num_voice = (0, 0) if control is None else (control.num_images, control.num_voice_latents)
        return Latents(video=made.video[:, :, num_images:], audio=made.audio[:, num_voice:])


def _grid(config: MMControlConfig) -> LatentGrid:
    temporal, spatial = VIDEO_FACTORS[config.codecs.video]
    return LatentGrid(
        fps=config.data.fps,
        temporal_factor=temporal,
        spatial_factor=spatial,
        audio_rate=AUDIO_LATENTS_PER_S[config.codecs.audio],
        audio_factor=4 if config.codecs.audio == "ltx2" else 1,
    )


build = MMControl
"""What `just train` calls: config -> module."""
