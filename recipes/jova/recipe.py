"""JoVA's training step and sampler: joint self-attention and the mouth-weighted loss (arXiv 2512.13677)."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avlit.batch import AVBatch
from avlit.codecs.pretrained import fingerprint
from avlit.conditioning import kept
from avlit.config import ConfigError, SampleConfig
from avlit.models.mmdit_branch import BranchText
from avlit.models.twin_mmdit import TwinMMDiT, duplicate_video, load_released, mmdit_trainable
from avlit.module import AVModule
from avlit.mouth_mask import mouth_coverage
from avlit.objectives import (
    Losses,
    flow_diffuse,
    flow_velocity,
    mean_squared_error,
    shift_sigma,
    wan_scheduler_config,
)
from avlit.randomness import Draws
from avlit.sampling import Latents, build_scheduler, guide, run_scheduler, start_noise
from avlit.timing import audio_latents_of
from data.encode import Encoders
from recipes.jova.config import JoVAConfig, JoVASample

STEPS_WITHOUT_MOUTH = 20
"""Steps in a row without any mouth after which the user is told."""


class JoVA(AVModule):
    """Twin MM-DiTs, trained to predict the flow's velocity of video and sound, mouths most (JoVA, Section 3.2)."""

    model: TwinMMDiT

    def __init__(self, config: JoVAConfig, *, start_step: int = 0):
        # Drawing branches that released weights then fill would take minutes at the paper's size.
        model = TwinMMDiT(config.model, seed=config.seed, draws_video=config.model.weights is None)
        super().__init__(
            model, optimizer=config.optimizer, steps=config.train.steps, seed=config.seed, start_step=start_step
        )
        self.config = config
        self.mouthless_since: int | None = None  # step of training

    def freeze(self) -> None:
        """Leave trainable what `model.trainable` names: a branch, or both (JoVA, 4.2)."""
        trained = set(mmdit_trainable(self.model, which=self.config.model.trainable))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)

    def load_released(self, folder: str) -> str:
        """Read HunyuanVideo's transformer from a released diffusers folder into both branches (JoVA, 3.2.1)."""
        report = load_released(self.model, folder)
        self.model.float()  # a folder's bfloat16 would lose small updates; what stays frozen is lowered again
        self.released = frozenset(report.loaded)
        self.base_model = fingerprint(Path(report.folder).glob("*.safetensors"))
        return str(report)

    def copy_weights(self, inherited: frozenset[str], trained: frozenset[str]) -> str:
        """Start the audio branch as a copy of the video branch, where the config asks for it (JoVA, 3.2.1).

        One that was trained before is left alone.
        """
        if not self.config.model.duplicate_video:
            return ""
        if any(name.startswith("audio.") for name in trained):
            return "model.duplicate_video: the audio branch was trained before, and stays as it is"
        copied = duplicate_video(self.model)
        self.released -= set(copied)
        return f"model.duplicate_video: {len(copied)} tensors of the audio branch are copies of the video branch's"

    def check_encoders(self, encoders: Encoders) -> None:
        """Raise ConfigError where the branches' sizes do not fit what the codecs make."""
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

    def joint_conditions(self, batch: AVBatch) -> dict[str, Any] | None:
        """The text of each branch; None for a branch alone, and where branches meet in cross-attention."""
        if not self.config.is_joint or self.config.model.fusion != "joint":
            return None
        return {**self._texts(batch, np.ones(len(batch), dtype=bool))}

    @property
    def tokens_per_sample(self) -> int:
        """Video and audio tokens of the configured clip; the texts' come to those."""
        config, timing = self.config, self.config.timing
        video = 0 if config.codecs.video == "none" else timing.video_tokens(config.model.patch_size)
        audio = 0 if config.codecs.audio == "none" else audio_latents_of(config.codecs.audio, timing.duration_s)
        return video + audio

    def step(self, batch: AVBatch, draws: Draws) -> Losses:
        """Noise video and sound alike, predict the velocities, compare, mouths once more (JoVA, Eqs. 2, 3, 6, 7)."""
        video, audio = batch.video_latents, batch.audio_latents  # [B, C, T, h, w], [B, L, C]
        device = batch.text.device
        sigma = shift_sigma(torch.from_numpy(draws.times()), self.config.flow_shift).float()  # [B], 1 - t of Eq. 2
        sigma = sigma.to(device, non_blocking=True)
        has_text = ~draws.happens("drop text", self.config.dropout.text)
        inputs: dict[str, Any] = {**self._texts(batch, has_text)}
        parts: dict[str, Tensor] = {}
        measures: dict[str, Tensor] = {}
        if audio is not None:
            audio_noise = draws.normal("audio noise", audio)
            inputs |= {"audio_latents": flow_diffuse(audio, audio_noise, sigma), "audio_timestep": 1000 * sigma}
        if video is not None:
            video_noise = draws.normal("video noise", video)
            inputs |= {"video_latents": flow_diffuse(video, video_noise, sigma), "video_timestep": 1000 * sigma}
            inputs |= self._image(video, draws.happens("give image", self.config.image_share))
        pred = self._velocities(batch, inputs)
        if video is not None:
            target = flow_velocity(video, video_noise)
            parts["video"] = mean_squared_error(pred.video, target)  # [B]
            if batch.mouth_mask is not None:
                if draws.is_training:
                    self._note_mouths(batch)
                measures["mouth_coverage"] = mouth_coverage(batch.mouth_mask)
                with torch.set_grad_enabled(bool(self.config.mouth_weight) and torch.is_grad_enabled()):
                    parts["mouth"] = mean_squared_error(pred.video, target, mask=batch.mouth_mask[:, None])  # [B]
        if audio is not None:
            parts["audio"] = mean_squared_error(pred.audio, flow_velocity(audio, audio_noise))  # [B]
        return Losses(
            parts=parts,
            noise_level=sigma,
            weights={"mouth": self.config.mouth_weight or 0.0},
            applies={"mouth": batch.has_mouth},
            measures=measures,
        )

    def _texts(self, batch: AVBatch, has_text: np.ndarray) -> dict[str, BranchText]:
        """The text of each branch that has latents; clips where `has_text`, bool [B], is False have none."""
        texts: dict[str, BranchText] = {}
        if batch.video_latents is not None:
            texts["video_text"] = self._text(batch.text, batch.text_lengths, has_text)
        if batch.audio_text is not None:
            texts["audio_text"] = self._text(batch.audio_text, batch.audio_text_lengths, has_text)
        elif batch.audio_latents is not None:  # the only branch, and so the only text
            texts["audio_text"] = self._text(batch.text, batch.text_lengths, has_text)
        return texts

    def _text(self, features: Tensor, lengths: tuple[int, ...], has_text: np.ndarray) -> BranchText:
        """Features [B, L, D] cut to the longest of the batch; no text is one token of zeros."""
        shown = [length if has and length else 1 for length, has in zip(lengths, has_text, strict=True)]
        pooled_dim = self.config.model.pooled_dim
        return BranchText(
            kept(features, has_text)[:, : max(shown)],
            lengths=shown,
            pooled=None if pooled_dim is None else features.new_zeros(len(features), pooled_dim),  # chosen: no CLIP
        )

    def _image(self, video: Tensor, has_image: np.ndarray) -> dict[str, Tensor]:
        """The first latent frame as reference image of the clips where `has_image`, bool [B], is True."""
        if not has_image.any():
            return {}
        given = torch.from_numpy(has_image).to(video.device, non_blocking=True)
        return {"image": video[:, :, :1], "has_image": given}

    def _velocities(self, batch: AVBatch, inputs: dict[str, Any]) -> Any:
        """The model's prediction; sound alone is placed on the time axis of the video that it would go with."""
        inputs = {"video_latents": None, "audio_latents": None, **inputs}
        if batch.video_latents is None:
            timing = self.config.timing
            inputs["num_frames"] = timing.latent_frames * batch.duration_s / timing.duration_s
        return self.model(**inputs)

    def _note_mouths(self, batch: AVBatch) -> None:
        if any(batch.has_mouth):
            self.mouthless_since = None
            return
        if self.mouthless_since is None:
            self.mouthless_since = batch.step
        if batch.step >= self.mouthless_since + STEPS_WITHOUT_MOUTH and self.config.mouth_weight:
            self.mouthless_since = batch.step + 1
            warnings.warn(
                f"mouth_weight={self.config.mouth_weight:g}: no clip of {STEPS_WITHOUT_MOUTH} steps shows a mouth; the "
                "mouth loss is 0. Look at the boxes with `just inspect mouth`, or set mouth_weight=null",
                stacklevel=2,
            )

    @property
    def scheduler_settings(self) -> dict[str, Any]:
        """A flow with the sampler's shift."""
        return wan_scheduler_config(shift=self.config.sample.flow_shift)

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
        """Video and sound, or one of them, for the texts of the branches.

        keyframes: the first frame, which is given as reference image, or None. Guidance contrasts both texts with none;
        the image is given in both passes (chosen).
        """
        assert isinstance(settings, JoVASample)
        video, audio = batch.video_latents, batch.audio_latents
        given = None if keyframes is None else keyframes[:, 0].cpu().numpy()
        if keyframes is not None and keyframes[:, 1:].any():
            raise ValueError("keyframes: JoVA takes a reference image as the first frame, and no other")
        device = batch.text.device
        sampler = build_scheduler(
            settings.scheduler, wan_scheduler_config(shift=settings.flow_shift), steps=settings.steps, device=device
        )
        noise = Latents(
            video=None if video is None else start_noise(seeds, video, "video"),
            audio=None if audio is None else start_noise(seeds, audio, "audio"),
        )
        all_clips = np.ones(len(batch), dtype=bool)
        passes = [self._texts(batch, ~all_clips), self._texts(batch, all_clips)]
        scales = {"video": [settings.guidance], "audio": [settings.audio_guidance]}
        used = [settings.guidance] * (video is not None) + [settings.audio_guidance] * (audio is not None)
        if all(scale == 1.0 for scale in used):
            passes, scales = passes[1:], {"video": [], "audio": []}
        image = {} if video is None or given is None else self._image(video, given)

        def predict(packed: Tensor, timestep: float) -> Tensor:
            noisy = noise.unpack(packed)
            times = torch.full((len(batch),), float(timestep), device=device)
            inputs: dict[str, Any] = dict(image)
            if noisy.video is not None:
                inputs |= {"video_latents": noisy.video, "video_timestep": times}
            if noisy.audio is not None:
                inputs |= {"audio_latents": noisy.audio, "audio_timestep": times}
            found = [self._velocities(batch, inputs | texts) for texts in passes]
            return Latents(
                video=None if video is None else guide([each.video for each in found], scales["video"]),
                audio=None if audio is None else guide([each.audio for each in found], scales["audio"]),
            ).pack()

        generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        packed = run_scheduler(predict, noise=noise.pack(), scheduler=sampler, generators=generators, on_step=on_step)
        return noise.unpack(packed)


build = JoVA
"""What `just train` calls: config -> module."""
