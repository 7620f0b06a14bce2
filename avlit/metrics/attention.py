"""Where the joint attention of one clip goes (UniTalking, Fig. 5): shares of it, each beside what chance would give."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avlit.models.aligned_rope import aligned_positions

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels."""


@dataclass(frozen=True)
class Share:
    """A share of the attention, and that of attention spread evenly over all tokens; both from 0 to 1."""

    found: float
    chance: float


@dataclass(frozen=True)
class AttentionShares:
    """Of one layer and clip, the mean of its heads.

    sound_to_video: of what sound looks at, what is video. video_to_sound: of what video looks at, what is sound.
    in_mouths: of what sound looks at in the video, what lies in mouth boxes; None where no mouth is known.
    in_time: of what video looks at in the sound, what lies within one latent frame of its own time.
    """

    sound_to_video: Share
    video_to_sound: Share
    in_mouths: Share | None
    in_time: Share


def attention_shares(
    audio_to_video: Tensor,
    video_to_audio: Tensor,
    *,
    grid: tuple[int, int, int],
    num_keys: int,
    mouths: Tensor | None = None,
) -> AttentionShares:
    """The shares of one clip's maps, audio_to_video [L, N] and video_to_audio [N, L] (see `AttentionMaps`).

    grid: T, height and width of the N video tokens. num_keys: all tokens that are looked at. mouths [T, height,
    width]: see `mouth_cover`.
    """
    num_video, num_audio = video_to_audio.shape
    by_time = video_to_audio.unflatten(0, (grid[0], -1)).mean(1)  # [T, L]
    frames = torch.arange(grid[0], dtype=torch.float64)[:, None]
    is_near = (frames - aligned_positions(num_audio, num_frames=grid[0])).abs() <= 1  # [T, L]
    in_mouths = None if mouths is None else _share(audio_to_video.mean(0).unflatten(0, grid), mouths)
    return AttentionShares(
        sound_to_video=Share(float(audio_to_video.sum(1).mean()), num_video / num_keys),
        video_to_sound=Share(float(video_to_audio.sum(1).mean()), num_audio / num_keys),
        in_mouths=in_mouths,
        in_time=_share(by_time, is_near),
    )


def _share(attention: Tensor, part: Tensor) -> Share:
    """How much of the attention lies in a part: of the same shape, from 0 (outside) to 1."""
    attention, part = attention.double().cpu(), part.double().cpu()
    return Share(float((attention * part).sum() / attention.sum()), float(part.mean()))


def mouth_cover(
    boxes: Sequence[Sequence[Box]], *, grid: tuple[int, int, int], size: tuple[int, int], latent_frames: Sequence[int]
) -> Tensor | None:
    """How much of each video token's area mouths take, [T, height, width] from 0 to 1; None where there is no box.

    boxes: of each person in each frame. size: of a frame, H and W in pixels. latent_frames: the latent frame of each
    frame; a token's area is the mean of its frames. ValueError unless boxes and latent_frames are as many.
    """
    if not any(boxes):
        return None
    num_frames, height, width = grid
    total, count = torch.zeros(grid, dtype=torch.float64), torch.zeros(num_frames, 1, 1, dtype=torch.float64)
    for latent_frame, persons in zip(latent_frames, boxes, strict=True):
        covered = torch.zeros(height, width, dtype=torch.float64)
        for x1, y1, x2, y2 in persons:
            covered += _overlap(y1, y2, height, size[0])[:, None] * _overlap(x1, x2, width, size[1])
        total[latent_frame] += covered.clamp(max=1)  # boxes may overlap
        count[latent_frame] += 1
    return total / count.clamp_min(1)


def _overlap(low: float, high: float, num_cells: int, length: int) -> Tensor:
    """The share of each of `num_cells` equal parts of 0 to `length` that lies between low and high."""
    edges = torch.linspace(0, length, num_cells + 1, dtype=torch.float64)
    return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp_min(0) * num_cells / length
