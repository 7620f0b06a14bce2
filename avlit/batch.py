"""AVBatch, the contract between data and models. Letters used in the whole repository:

B clips of a micro-batch; C latent channels; T latent frames; h, w latent height and width; F pixel frames;
H, W pixels; L audio latents, or text tokens; R reference tokens; D feature width; N audio samples; P persons;
K layers of an audio encoder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tracks:
    """Features of the demixed tracks that drive a video, at its frame rate.

    speech, effects, music [B, F, K, D]. speech_second [B, F, K, D]: the second speaker's track (zeros without one);
    has_second: which clips have one (on the host, so that a batch without any costs nothing and no synchronisation).
    """

    speech: Tensor
    effects: Tensor
    music: Tensor
    speech_second: Tensor
    has_second: tuple[bool, ...]


@dataclass(frozen=True)
class AVBatch:
    """Encoded clips of one shape, ready for a training step. What the recipe does not read is None.

    keys: sample keys as in the shards. subsets: subset name of each clip. captions, audio_captions: the texts that
    `text` and `audio_text` encode. duration_s: seconds of every clip.
    step: optimizer step that the batch belongs to; slots: each clip's place in that step's global batch (on the host);
    together they key every random number, so noise does not depend on ranks, workers or accumulation.
    text [B, L, D] zero-padded; text_lengths: each clip's tokens before the padding (on the host). audio_text, its
    lengths alike: of recipes whose audio branch has a text of its own.
    video_latents [B, C, T, h, w] and audio_latents [B, L, C], normalised as the backbone expects.
    reference [B, R, C]: latents of another sound of the same speaker, zero-padded; has_reference: which clips have one
    (on the host).
    reference_image [B, C, 1, h, w], depth and pose [B, C, T, h, w]: latents of the video codec, zeros where a clip has
    none; has_reference_image, has_depth, has_pose: which clips have one (on the host).
    mouth_mask bool [B, T, h, w]: latent cells that show a mouth; has_mouth: the clips with any (on the host).
    """

    keys: tuple[str, ...]
    subsets: tuple[str, ...]
    captions: tuple[str, ...]
    duration_s: float
    step: int
    slots: tuple[int, ...]
    text: Tensor
    text_lengths: tuple[int, ...]
    audio_captions: tuple[str, ...] = ()
    audio_text: Tensor | None = None
    audio_text_lengths: tuple[int, ...] = ()
    video_latents: Tensor | None = None
    audio_latents: Tensor | None = None
    tracks: Tracks | None = None
    reference: Tensor | None = None
    has_reference: tuple[bool, ...] = ()
    mouth_mask: Tensor | None = None
    has_mouth: tuple[bool, ...] = ()
    reference_image: Tensor | None = None
    has_reference_image: tuple[bool, ...] = ()
    depth: Tensor | None = None
    has_depth: tuple[bool, ...] = ()
    pose: Tensor | None = None
    has_pose: tuple[bool, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "AVBatch":
        """The same batch with every tensor on `device`; Lightning's transfer calls this."""
        return _with_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pinned(self) -> "AVBatch":
        """The same batch in page-locked memory, so that its way to the device does not hold the training loop up."""
        return _with_tensors(self, Tensor.pin_memory)


def concatenate(batches: Sequence[AVBatch]) -> AVBatch:
    """Several batches of one shape as one; `step` is the first's."""
    return _joined(batches)


Group = TypeVar("Group", AVBatch, Tracks)


def _with_tensors(group: Group, change: Callable[[Tensor], Tensor]) -> Group:
    changed: dict[str, Any] = {}
    for each in fields(group):
        value = getattr(group, each.name)
        if isinstance(value, Tensor):
            changed[each.name] = change(value)
        elif isinstance(value, Tracks):
            changed[each.name] = _with_tensors(value, change)
    return replace(group, **changed)


def _joined(groups: Sequence[Group]) -> Group:
    joined: dict[str, Any] = {}
    for each in fields(groups[0]):
        values: list[Any] = [getattr(group, each.name) for group in groups]
        if isinstance(values[0], Tensor):
            joined[each.name] = torch.cat(values)
        elif isinstance(values[0], tuple):
            joined[each.name] = tuple(item for value in values for item in value)
        elif isinstance(values[0], Tracks):
            joined[each.name] = _joined(values)
    return replace(groups[0], **joined)
