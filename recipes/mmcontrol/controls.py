"""What the clips of a batch are controlled by, as step and sampler give it to the model (MMControl, Section 3.2).

Of a clip, T latent frames of h * w cells and L audio latents are generated. R reference images (one latent frame) and P
latents of a reference voice lead them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avlit.batch import AVBatch
from avlit.codecs.blank import grey_latents, silence_latents
from avlit.codecs.build import build_audio_codec, build_video_codec
from avlit.models.control_unit import Control, control_unit
from avlit.models.ltx2_backbone import LatentGrid
from avlit.sampling import Latents
from recipes.mmcontrol.config import MMControlConfig


@dataclass(frozen=True)
class Given:
    """Which clips are controlled by what, bool [B] each, on the host; a clip has depth or pose."""

    image: np.ndarray
    voice: np.ndarray
    depth: np.ndarray
    pose: np.ndarray


def present(batch: AVBatch) -> Given:
    """Every control that a clip has, which may be depth and pose at once."""

    def flags(has: tuple[bool, ...]) -> np.ndarray:
        return np.array(has, dtype=bool) if has else np.zeros(len(batch), dtype=bool)

    return Given(
        image=flags(batch.has_reference_image),
        voice=flags(batch.has_reference),
        depth=flags(batch.has_depth),
        pose=flags(batch.has_pose),
    )


class Controls:
    """Makes the Multi-Modal Control Unit of batches; what clips lack is the codecs' grey and silence, made once."""

    def __init__(self, config: MMControlConfig, grid: LatentGrid) -> None:
        self._codecs, self._num_voice, self._grid = config.codecs, config.reference_tokens, grid
        self._blank: dict[tuple[int, ...], Tensor] = {}  # by their size

    def unit(self, batch: AVBatch, given: Given) -> Control:
        """What each clip is given, and grey or silence for what it is not (MMControl, Eqs. 2, 3)."""
        video, audio = batch.video_latents, batch.audio_latents
        assert video is not None and audio is not None

        def on_device(flags: np.ndarray) -> Tensor:
            return torch.from_numpy(flags).to(video.device, non_blocking=True)

        num_voice = self._num_voice
        grey, silence = self.grey(video), self.silence(audio, num_voice + audio.shape[1])
        image = grey[:, :, :1].expand(len(batch), -1, -1, -1, -1)
        if batch.reference_image is not None:
            image = batch.reference_image
        voice = silence[:, :num_voice].expand(len(batch), -1, -1) if num_voice else None
        if voice is not None and batch.reference is not None:  # zeros after its end are no sound that the codec makes
            voice = torch.where(batch.reference.any(-1, keepdim=True), batch.reference, voice)
        structure = batch.depth if batch.pose is None else batch.pose
        if batch.depth is not None and batch.pose is not None:
            structure = torch.where(on_device(given.pose)[:, None, None, None, None], batch.pose, batch.depth)
        return control_unit(
            empty=grey,
            silence=silence,
            image=image,
            structure=structure,
            voice=voice,
            has_image=on_device(given.image),
            has_structure=None if structure is None else on_device(given.depth | given.pose),
            has_voice=None if voice is None else on_device(given.voice),
        )

    def grey(self, like: Tensor) -> Tensor:
        """Latents [1, C, T, h, w] of a grey video of the size of `like` [B, C, T, h, w]."""
        if like.is_meta:  # only shapes count
            return torch.empty_like(like[:1])
        size = tuple(like.shape[2:])
        if size not in self._blank:
            temporal, spatial = self._grid.temporal_factor, self._grid.spatial_factor
            codec = build_video_codec(self._codecs.video, self._codecs.video_weights, device=str(like.device))
            with torch.inference_mode(False):  # else a first measurement would make it, and training could not use it
                self._blank[size] = grey_latents(
                    codec, num_frames=1 + temporal * (size[0] - 1), height=spatial * size[1], width=spatial * size[2]
                ).to(like)
        return self._blank[size]

    def silence(self, like: Tensor, num_latents: int) -> Tensor:
        """The first latents of silence, [1, num_latents, C], beside sound `like` [B, L, C]."""
        if like.is_meta:
            return like.new_empty(1, num_latents, like.shape[2])
        size = (num_latents,)
        if size not in self._blank:
            codec = build_audio_codec(self._codecs.audio, self._codecs.audio_weights, device=str(like.device))
            with torch.inference_mode(False):
                self._blank[size] = silence_latents(codec, num_latents).to(like)
        return self._blank[size]

    def led_by_blank(self, latents: Latents, control: Control | None) -> Latents:
        """Latents with grey and silence in front, in the places of references."""
        if control is None:
            return latents
        assert latents.video is not None and latents.audio is not None
        count, num_voice = latents.video.shape[0], control.num_voice_latents
        silence = self.silence(latents.audio, num_voice + latents.audio.shape[1])[:, :num_voice]
        grey = self.grey(latents.video)[:, :, : control.num_images]
        return led(latents, grey.expand(count, -1, -1, -1, -1), silence.expand(count, -1, -1))


def led(latents: Latents, image: Tensor, voice: Tensor) -> Latents:
    """Latents with those of references, image [B, C, R, h, w] and voice [B, P, C], in front."""
    assert latents.video is not None and latents.audio is not None
    return Latents(video=torch.cat((image, latents.video), dim=2), audio=torch.cat((voice, latents.audio), dim=1))


def supervised(control: Control) -> tuple[Tensor, Tensor]:
    """Where the loss looks, 0 or 1: video [B, 1, R + T, 1, 1] and sound [B, P + L, 1]; references where a clip has one.

    The mask is 0 there, and 1 in the clip.
    """
    video, audio = control.visual[:, -1:, :, :1, :1].clone(), control.acoustic[..., -1:].clone()
    for lead in (video[:, :, : control.num_images], audio[:, : control.num_voice_latents]):
        lead.neg_().add_(1)
    return video, audio
