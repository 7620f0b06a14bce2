"""MTV's training step and sampler: video driven by demixed speech, effects and music (arXiv 2506.08003)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avlit.batch import AVBatch
from avlit.codecs.pretrained import fingerprint
from avlit.conditioning import kept
from avlit.config import SampleConfig
from avlit.models.mst_controlnet import MSTControlNet, build_mst_controlnet, mtv_trainable
from avlit.models.pretrained import load_backbone
from avlit.module import AVModule
from avlit.objectives import (
    Losses,
    cogvideox_alphas_cumprod,
    cogvideox_scheduler_config,
    diffuse,
    flow_diffuse,
    flow_velocity,
    mean_squared_error,
    shift_sigma,
    velocity,
    wan_scheduler_config,
)
from avlit.randomness import Draws
from avlit.sampling import Latents, build_scheduler, guide, run_scheduler, start_noise
from recipes.mtv.config import MTVConfig
from recipes.mtv.keyframes import keyframe_mask


class MTV(AVModule):
    """The MST-ControlNet with its backbone, trained to predict v (MTV, Section 4)."""

    model: MSTControlNet
    alphas_cumprod: Tensor

    def __init__(self, config: MTVConfig, *, start_step: int = 0):
        model = build_mst_controlnet(config.model, seed=config.seed)
        super().__init__(
            model, optimizer=config.optimizer, steps=config.train.steps, seed=config.seed, start_step=start_step
        )
        self.config = config
        self.register_buffer("alphas_cumprod", cogvideox_alphas_cumprod(snr_shift=config.snr_shift), persistent=False)

    def freeze(self) -> None:
        """Leave trainable what `model.trainable` names (MTV, Section 4.3: the ControlNet and the attention layers)."""
        trained = set(mtv_trainable(self.model, which=self.config.model.trainable))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)

    def load_released(self, folder: str) -> str:
        """Read CogVideoX's (or Wan's) transformer from a released diffusers folder."""
        report = load_backbone(self.model, folder)
        self.released = frozenset(report.loaded)
        self.base_model = fingerprint(Path(report.folder).glob("*.safetensors"))
        return str(report)

    @property
    def tokens_per_sample(self) -> int:
        """Video tokens of the configured clip and the padded text."""
        model = self.config.model
        return self.config.timing.video_tokens(model.patch_size) + model.max_text_tokens

    def step(self, batch: AVBatch, draws: Draws) -> Losses:
        """Noise the clip, predict v from text and the three tracks, compare (MTV, Eq. 1 with the code's v target)."""
        clean = batch.video_latents  # [B, C, T, h, w]
        assert clean is not None
        batch = self._drop_conditions(batch, draws)
        noise = draws.normal("noise", clean)
        noisy, target, timestep = self.noised(clean, noise, draws.times())
        given = keyframe_mask(draws, latent_frames=clean.shape[2], probabilities=self.config.keyframes)
        keyframes, mask = None, None
        if given is not None:
            keyframes = torch.from_numpy(given).to(clean.device, non_blocking=True)  # [B, T]
            frames = keyframes[:, None, :, None, None]  # [B, 1, T, 1, 1]
            least_noisy, _, _ = self.noised(clean, noise, np.zeros(len(batch)))  # t = 0
            noisy, mask = torch.where(frames, least_noisy, noisy), ~frames
        pred = self._predict(batch, noisy, timestep, keyframes)
        loss = mean_squared_error(pred, target, mask=mask)  # [B]; given frames are not supervised
        return Losses(parts={"video": loss}, noise_level=timestep / 1000)

    def noised(self, clean: Tensor, noise: Tensor, times: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, the target, and the timestep [B] from 0 to 1000, for `times` [B] in [0, 1).

        CogVideoX predicts v at one of 1000 noise levels; Wan the flow's velocity, its levels shifted to high noise.
        """
        uniform = torch.from_numpy(times).to(clean.dtype).to(clean.device, non_blocking=True)
        if self.config.model.variant == "wan":
            sigma = shift_sigma(uniform, self.config.flow_shift)
            return flow_diffuse(clean, noise, sigma), flow_velocity(clean, noise), 1000 * sigma
        timestep = (uniform * len(self.alphas_cumprod)).long()
        alpha_bar = self.alphas_cumprod[timestep]
        return diffuse(clean, noise, alpha_bar), velocity(clean, noise, alpha_bar), timestep

    def _drop_conditions(self, batch: AVBatch, draws: Draws) -> AVBatch:
        """Replace the text, or all tracks together, by zeros for some clips: what guidance contrasts with."""
        keep_text = ~draws.happens("drop_text", self.config.dropout.text)
        keep_tracks = ~draws.happens("drop_tracks", self.config.dropout.tracks)
        return mute(batch, keep_text=keep_text, keep_tracks=keep_tracks)

    def _predict(self, batch: AVBatch, noisy: Tensor, timestep: Tensor, keyframes: Tensor | None) -> Tensor:
        tracks = batch.tracks
        assert tracks is not None
        return self.model(
            noisy,
            timestep=timestep,
            text=batch.text,
            speech=tracks.speech,
            effects=tracks.effects,
            music=tracks.music,
            speech_second=tracks.speech_second if any(tracks.has_second) else None,
            keyframe_mask=keyframes,
        )

    @property
    def scheduler_settings(self) -> dict[str, Any]:
        """What the backbone's released scheduler was configured with."""
        if self.config.model.variant == "wan":
            return wan_scheduler_config(shift=self.config.flow_shift)
        return cogvideox_scheduler_config(snr_shift=self.config.snr_shift)

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
        """Video latents for the batch's prompts and tracks; the sound that goes with them is the tracks' own.

        Guidance contrasts text and tracks together with neither (MTV's code; 3.5).
        """
        given = batch.video_latents
        assert given is not None
        sampler = build_scheduler(
            settings.scheduler, self.scheduler_settings, steps=settings.steps, device=given.device
        )
        nothing = np.zeros(len(batch), dtype=bool)
        without = mute(batch, keep_text=nothing, keep_tracks=nothing)
        frames = None if keyframes is None else keyframes[:, None, :, None, None]  # [B, 1, T, 1, 1]

        def predict(latents: Tensor, timestep: int) -> Tensor:
            if frames is not None:
                latents = torch.where(frames, given, latents)
            times = torch.full((len(batch),), timestep, device=latents.device)
            conditional = self._predict(batch, latents, times, keyframes)
            if settings.guidance == 1.0:
                return conditional
            return guide([self._predict(without, latents, times, keyframes), conditional], [settings.guidance])

        generators = [torch.Generator(device=given.device).manual_seed(seed) for seed in seeds]
        noise = start_noise(seeds, given)
        latents = run_scheduler(predict, noise=noise, scheduler=sampler, generators=generators, on_step=on_step)
        return Latents(video=latents if frames is None else torch.where(frames, given, latents))


def mute(batch: AVBatch, *, keep_text: np.ndarray, keep_tracks: np.ndarray) -> AVBatch:
    """The batch with the text, or the three tracks, of some clips set to zero. keep_* bool [B] on the host."""
    tracks = batch.tracks
    assert tracks is not None
    muted = replace(
        tracks,
        speech=kept(tracks.speech, keep_tracks),
        effects=kept(tracks.effects, keep_tracks),
        music=kept(tracks.music, keep_tracks),
        speech_second=kept(tracks.speech_second, keep_tracks),
    )
    return replace(batch, text=kept(batch.text, keep_text), tracks=muted)


build = MTV
"""What `just train` calls: config -> module."""
