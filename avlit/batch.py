"""AVBatch, the contract between data and models. Letters used in the whole repository:

B clips of a micro-batch; C latent channels; T latent frames; h, w latent height and width; F pixel frames;
H, W pixels; L text tokens; D feature width; N audio samples; P persons; K layers of an audio encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class AVBatch:
    """Encoded clips of one shape, ready for a training step.

    keys: sample keys as in the shards. subsets: subset name of each clip.
    step: optimizer step that the batch belongs to; slots: each clip's place in that step's global batch (on the host);
    together they key every random number, so noise does not depend on ranks, workers or accumulation.
    video_latents [B, C, T, h, w], normalised as the backbone expects.
    text [B, L, D] zero-padded; text_lengths [B] tokens before the padding.
    speech, effects, music [B, F, K, D]: track features at the video's frame rate.
    speech_second [B, F, K, D]: the second speaker's track (zeros without one); has_second: which clips have one
    (on the host, so that a batch without any costs nothing and no synchronisation).
    """

    keys: tuple[str, ...]
    subsets: tuple[str, ...]
    captions: tuple[str, ...]
    step: int
    slots: tuple[int, ...]
    video_latents: Tensor
    text: Tensor
    text_lengths: Tensor
    speech: Tensor
    effects: Tensor
    music: Tensor
    speech_second: Tensor
    has_second: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "AVBatch":
        """The same batch with every tensor on `device`; Lightning's transfer calls this."""
        moved = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def concatenate(batches: Sequence[AVBatch]) -> AVBatch:
    """Several batches of one shape as one; `step` is the first's."""
    first = batches[0]
    joined: dict[str, object] = {}
    for field in fields(first):
        values = [getattr(batch, field.name) for batch in batches]
        if isinstance(values[0], Tensor):
            joined[field.name] = torch.cat(values)
        elif isinstance(values[0], tuple):
            joined[field.name] = tuple(item for value in values for item in value)
    return replace(first, **joined)
