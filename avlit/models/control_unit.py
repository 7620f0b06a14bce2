"""The Multi-Modal Control Unit: references, structure and their masks as latents (MMControl, sec. 3.2).

A batch of mixed tasks is one tensor for each modality: what a clip lacks is empty or silent there. N = T * h * w video
tokens, L audio tokens; R reference images (one latent frame, or none) and P latents of a reference voice lead them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Control:
    """The Multi-Modal Control Unit (MMControl, Eqs. 2-4): latents, and the mask as their last channel.

    visual [B, C + 1, R + T, h, w], acoustic [B, P + L, C + 1]. The mask is 0 where a reference is to be kept, 1 where
    the clip is to be generated and where a clip lacks the reference that others of its batch have. num_images (R) and
    num_voice_latents (P): how many lead.
    """

    visual: Tensor
    acoustic: Tensor
    num_images: int
    num_voice_latents: int

    @property
    def images(self) -> Tensor:
        """Latents [B, C, R, h, w] that lead the main stream's video."""
        return self.visual[:, :-1, : self.num_images]

    @property
    def voices(self) -> Tensor:
        """Latents [B, P, C] that lead the main stream's sound."""
        return self.acoustic[:, : self.num_voice_latents, :-1]


def control_unit(
    *,
    empty: Tensor,
    silence: Tensor,
    image: Tensor | None = None,
    structure: Tensor | None = None,
    voice: Tensor | None = None,
    has_image: Tensor | None = None,
    has_structure: Tensor | None = None,
    has_voice: Tensor | None = None,
) -> Control:
    """Controls of a batch, whatever each clip has of them: what a clip lacks is empty or silent, its mask 1.

    empty [B, C, T, h, w]: the codec's latents of a grey video (zeros in [-1, 1]), the clip's size. silence
    [B, P + L, C]: of silence as long as voice and clip together. Either may have B = 1. image [B, C, 1, h, w],
    structure [B, C, T, h, w] (depth or pose), voice [B, P, C]; without an image or a voice nothing leads its stream.
    has_* [B] bool: which clips have it (None: all); the values of the others are not read. ValueError for shapes that
    do not fit together, and where no clip can have anything.
    """
    given = [x for x in (image, structure, voice) if x is not None]
    if not given:
        raise ValueError("image, structure and voice are all None: leave the control out")
    for name, value, has in (
        ("image", image, has_image), ("structure", structure, has_structure), ("voice", voice, has_voice)
    ):  # fmt: skip
        if value is None and has is not None:
            raise ValueError(f"has_{name} without {name}: give both or neither")
    batch, clip = given[0].shape[0], tuple(empty.shape[1:])
    for name, value, expected in (
        ("image", image, (clip[0], 1, *clip[2:])), ("structure", structure, clip)
    ):  # fmt: skip
        if value is not None and tuple(value.shape) != (batch, *expected):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {(batch, *expected)}, as empty has")
    if voice is not None and (
        voice.shape[0] != batch or voice.shape[2] != silence.shape[2] or voice.shape[1] >= silence.shape[1]
    ):
        raise ValueError(
            f"voice has shape {tuple(voice.shape)} for {batch} clips, silence {tuple(silence.shape)}: silence must be "
            "as long as voice and clip together, with as many channels"
        )
    empty, silence = empty.expand(batch, -1, -1, -1, -1), silence.expand(batch, -1, -1)
    num_images, num_voice = int(image is not None), 0 if voice is None else voice.shape[1]
    visual = _filled(structure, has_structure, empty)
    mask = torch.ones_like(visual[:, :1])
    if image is not None:
        visual = torch.cat((_filled(image, has_image, empty[:, :, :1]), visual), dim=2)
        mask = torch.cat((_reference_mask(mask[:, :, :1], has_image), mask), dim=2)
    acoustic, acoustic_mask = silence[:, num_voice:], torch.ones_like(silence[:, num_voice:, :1])
    if voice is not None:
        lead = _filled(voice, has_voice, silence[:, :num_voice])
        acoustic_mask = torch.cat((_reference_mask(torch.ones_like(lead[..., :1]), has_voice), acoustic_mask), dim=1)
        acoustic = torch.cat((lead, acoustic), dim=1)
    return Control(
        visual=torch.cat((visual, mask), dim=1),
        acoustic=torch.cat((acoustic, acoustic_mask), dim=2),
        num_images=num_images,
        num_voice_latents=num_voice,
    )


def _filled(value: Tensor | None, has: Tensor | None, otherwise: Tensor) -> Tensor:
    if value is None:
        return otherwise
    return value if has is None else torch.where(_per_clip(has, value), value, otherwise)


def _reference_mask(ones: Tensor, has: Tensor | None) -> Tensor:
    return torch.zeros_like(ones) if has is None else ones * ~_per_clip(has, ones)


def _per_clip(x: Tensor, like: Tensor) -> Tensor:
    return x.view(-1, *[1] * (like.ndim - 1))
