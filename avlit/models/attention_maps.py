"""Who looks at whom in the joint attention of video and sound (as UniTalking, Fig. 5), as numbers and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from avlit.models.joint_attention import Heads
from avlit.models.twin_mmdit import TwinMMDiT
from avlit.models.twin_wan import TwinWan

HEIGHT = 128  # pixels of a frame and of a matrix in the picture
MARGIN = 44  # pixels for the labels of an axis


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of each chosen layer, averaged over heads; a softmax over all tokens, so a row sums to the part shown.

    All tokens are those of video and sound and, in a twin MM-DiT, of both texts.

    layers: their numbers, from 0. video_to_audio [B, N, L]: video queries, audio keys; audio_to_video [B, L, N]: audio
    queries, video keys; one of each a layer, float32. grid: the video's tokens, N = T * height * width. num_keys: how
    many tokens are looked at in each clip, N + L and those of its texts.
    """

    layers: tuple[int, ...]
    video_to_audio: tuple[Tensor, ...]
    audio_to_video: tuple[Tensor, ...]
    grid: tuple[int, int, int]
    num_keys: tuple[int, ...]

    def saliency(self, layer: int) -> Tensor:
        """How much the sound looks at each place of each latent frame [B, T, height, width], the mean of its tokens."""
        return self.audio_to_video[self.layers.index(layer)].mean(1).unflatten(-1, self.grid)

    def time_by_time(self, layer: int) -> Tensor:
        """How much each latent frame looks at each audio token [B, T, L], the mean of its places."""
        return self.video_to_audio[self.layers.index(layer)].unflatten(1, (self.grid[0], -1)).mean(2)


@torch.no_grad()
def attention_maps(
    model: TwinWan | TwinMMDiT,
    video_latents: Tensor,
    audio_latents: Tensor,
    *,
    layers: Sequence[int] | None = None,
    **given: Any,
) -> AttentionMaps:
    """The joint attention of one forward pass, whose arguments these are; layers: None for all.

    ValueError for a layer that the model does not have.
    """
    num_layers = model.num_joint_layers
    chosen = tuple(range(num_layers)) if layers is None else tuple(layers)
    for layer in chosen:
        if not 0 <= layer < num_layers:
            raise ValueError(f"layers={list(chosen)}: the model has layers 0 to {num_layers - 1}")
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    num_keys: list[int] = []

    def observe(layer: int, streams: Sequence[Heads]) -> None:
        if layer in chosen:
            video, audio, *_ = streams
            key = torch.cat([each.key for each in streams], dim=2)
            unread = _unread(streams)
            num_unread = [0] * len(key) if unread is None else unread.sum((1, 2)).tolist()
            num_keys[:] = [key.shape[2] - each for each in num_unread]
            of_audio = slice(video.num_tokens, video.num_tokens + audio.num_tokens)
            to_audio = _weights(video.query, key, unread)[..., of_audio].clone()  # [B, N, L], without the rest
            seen[layer] = (to_audio, _weights(audio.query, key, unread)[..., : video.num_tokens].clone())

    model(video_latents, audio_latents, observe=observe, **given)
    _, _, frames, height, width = video_latents.shape
    patch = model.config.patch_size
    return AttentionMaps(
        layers=chosen,
        video_to_audio=tuple(seen[layer][0] for layer in chosen),
        audio_to_video=tuple(seen[layer][1] for layer in chosen),
        grid=(frames, height // patch, width // patch),
        num_keys=tuple(num_keys),
    )


def _unread(streams: Sequence[Heads]) -> Tensor | None:
    """Keys that nothing reads, such as padding, bool [B, 1, keys]; None for none."""
    if all(stream.seen is None for stream in streams):
        return None
    is_seen = [
        stream.key.new_ones(stream.key.shape[0], stream.num_tokens, dtype=torch.bool)
        if stream.seen is None
        else stream.seen
        for stream in streams
    ]
    return ~torch.cat(is_seen, dim=1)[:, None]


def _weights(query: Tensor, key: Tensor, unread: Tensor | None) -> Tensor:
    """Attention [B, queries, keys] of [B, heads, tokens, head], averaged over heads (one at a time, for memory)."""
    num_heads = query.shape[1]
    total = torch.zeros(query.shape[0], query.shape[2], key.shape[2], device=query.device)
    for head in range(num_heads):
        scores = query[:, head].float() @ key[:, head].float().transpose(1, 2) / query.shape[-1] ** 0.5
        if unread is not None:
            scores = scores.masked_fill(unread, float("-inf"))
        total += scores.softmax(-1) / num_heads
    return total


def draw_attention(
    maps: AttentionMaps,
    frames: np.ndarray | None,
    path: Path | str,
    *,
    duration_s: float,
    clip: int = 0,
    columns: int = 4,
) -> None:
    """A PNG with a row for each layer of one clip, every part from black (none) to white (its own maximum).

    Left the sound's saliency over `columns` latent frames evenly spread in time, mixed with the uint8 frames
    [F, H, W, 3] of their times where given; right the time-by-time matrix, video downwards and sound to the right.
    """
    rows = [_layer_row(maps, layer, frames, duration_s, clip, columns) for layer in maps.layers]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for number, row in enumerate(rows):
        sheet.paste(row, (0, number * row.height))
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    sheet.save(part, format="PNG")
    part.replace(path)


def _layer_row(
    maps: AttentionMaps, layer: int, frames: np.ndarray | None, duration_s: float, clip: int, columns: int
) -> Image.Image:
    num_frames, height, width = maps.grid
    columns = min(columns, num_frames)
    shown = ((np.arange(columns) + 0.5) * num_frames / columns).astype(int)
    saliency = maps.saliency(layer)[clip].cpu().numpy()  # [T, h, w]
    matrix = maps.time_by_time(layer)[clip].cpu().numpy()  # [T, L]
    cell, top, font = round(HEIGHT * width / height), 24, ImageFont.load_default(size=12)
    left, span = cell * columns + MARGIN, 2 * HEIGHT  # of the matrix
    row = Image.new("RGB", (left + span + MARGIN // 2, top + HEIGHT + MARGIN), "white")
    draw = ImageDraw.Draw(row)
    draw.text((6, 4), f"layer {layer}: where sound looks (highest {saliency.max():.2g})", fill="black", font=font)
    draw.text((left, 4), f"video looking at sound (highest {matrix.max():.2g})", fill="black", font=font)
    for column, number in enumerate(shown):
        picture = _heat(saliency[number] / saliency.max()).resize((cell, HEIGHT), Image.Resampling.BICUBIC)
        if frames is not None:
            frame = Image.fromarray(frames[min(len(frames) - 1, int((number + 0.5) * len(frames) / num_frames))])
            picture = Image.blend(frame.resize((cell, HEIGHT)), picture, 0.6)
        row.paste(picture, (column * cell, top))
        draw.text((column * cell + 4, top + HEIGHT + 3), f"{number * duration_s / num_frames:.2f} s", "black", font)
    row.paste(_heat(matrix / matrix.max()).resize((span, HEIGHT), Image.Resampling.NEAREST), (left, top))
    for part in (0, 0.5, 1):
        time = f"{part * duration_s:.2f}"
        x, y = left + part * span, top + part * HEIGHT
        draw.line((x, top + HEIGHT, x, top + HEIGHT + 3), fill="black")
        draw.text((x, top + HEIGHT + 4), time, fill="black", font=font, anchor="ma")
        draw.line((left - 4, y, left - 1, y), fill="black")
        draw.text((left - 6, y), time, fill="black", font=font, anchor="rm")
    draw.text((left + span / 2, top + HEIGHT + 19), "s of sound; video downwards", "black", font, anchor="ma")
    return row


def _heat(values: np.ndarray) -> Image.Image:
    """[H, W] from 0 to 1 as colours from black to near white."""
    stops = np.array([(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)])
    colors = [np.interp(values, np.linspace(0, 1, len(stops)), stops[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(colors, axis=-1).astype(np.uint8))
