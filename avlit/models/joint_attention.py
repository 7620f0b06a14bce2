"""Self-attention over the tokens of several streams at once: what couples the twins of video and sound in every block.

Each stream brings queries, keys and values from its own projections (UniTalking, sec. 4.4; JoVA, Eq. 4). N is the
number of a stream's tokens, here and in the models that use this.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from avlit.models.backbones import Rotary, Stock
from avlit.models.mst_controlnet import split_heads
from avlit.models.rotation import rotate_pairs

Mode = Literal["joint", "one-way", "separate"]
"""joint: every token attends to every token. one-way: the first stream only to itself, the others to everything.
separate: each stream only to itself."""


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values of one stream, each [B, heads, N, head], normalised and rotated.

    seen [B, N] bool: False for tokens that no query reads, such as padding; None reads all, which flash kernels need.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    seen: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """N, the stream's tokens."""
        return self.query.shape[2]

    def of_clips(self, start: int, stop: int) -> "Heads":
        """The same of the clips start to stop - 1."""
        seen = None if self.seen is None else self.seen[start:stop]
        return Heads(self.query[start:stop], self.key[start:stop], self.value[start:stop], seen)


def project_heads(attention: Stock, tokens: Tensor, rotary: Rotary | None) -> Heads:
    """Tokens [B, N, D] through the projections and norms of a diffusers self-attention, then rotated.

    rotary: cosines and sines [N, head] of adjacent pairs (Wan, HunyuanVideo); None for tokens without positions (text).
    """
    query = split_heads(attention.to_q(tokens), attention.heads, attention.norm_q)  # [B, heads, N, head]
    key = split_heads(attention.to_k(tokens), attention.heads, attention.norm_k)
    value = attention.to_v(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    if rotary is not None:
        query, key = rotate_pairs(query, *rotary), rotate_pairs(key, *rotary)
    return Heads(query, key, value)


def joint_attention(streams: Sequence[Heads], *, mode: Mode | Sequence[Mode]) -> tuple[Tensor, ...]:
    """What each stream's tokens gather, [B, N, heads * head] for each stream; a single one attends to itself.

    mode: one for all clips, or one for each (tasks differ within a batch). one-way is two calls rather than one with a
    dense mask: the same numbers, faster, and flash kernels take no mask. Streams that see each other but not the rest
    are given as one, first. ValueError for an unknown mode or another number of modes than clips.
    """
    clips = streams[0].query.shape[0]
    modes = cast("list[Mode]", [mode] * clips if isinstance(mode, str) else list(mode))
    if len(modes) != clips:
        raise ValueError(f"{len(modes)} modes for {clips} clips: give one for all or one for each")
    for name in modes:
        if name not in get_args(Mode):
            raise ValueError(f"mode={name!r}: must be one of {', '.join(get_args(Mode))}")
    if len(set(modes)) == 1:  # slices, even whole ones, would be copied in the backward pass
        gathered = list(_attend(streams, modes[0]))
    else:
        parts: list[tuple[Tensor, ...]] = []
        start = 0
        for run_mode, run in groupby(modes):
            stop = start + len(list(run))
            parts.append(_attend([stream.of_clips(start, stop) for stream in streams], run_mode))
            start = stop
        gathered = [torch.cat(part) for part in zip(*parts, strict=True)]
    return tuple(part.transpose(1, 2).flatten(2) for part in gathered)


def _attend(streams: Sequence[Heads], mode: Mode) -> tuple[Tensor, ...]:
    if mode == "separate" or len(streams) == 1:
        return tuple(_read(stream.query, [stream]) for stream in streams)
    sighted = streams if mode == "joint" else streams[1:]
    query = torch.cat([stream.query for stream in sighted], dim=2)
    gathered = _read(query, streams).split([stream.num_tokens for stream in sighted], dim=2)
    if mode == "joint":
        return tuple(gathered)
    return (_read(streams[0].query, streams[:1]), *gathered)


def _read(query: Tensor, streams: Sequence[Heads]) -> Tensor:
    """Queries [B, heads, M, head] over all tokens of the streams -> [B, heads, M, head]."""
    key, value, mask = streams[0].key, streams[0].value, None
    if len(streams) > 1:
        key = torch.cat([stream.key for stream in streams], dim=2)
        value = torch.cat([stream.value for stream in streams], dim=2)
    if any(stream.seen is not None for stream in streams):
        seen = [
            torch.ones(stream.key.shape[0], stream.num_tokens, dtype=torch.bool, device=key.device)
            if stream.seen is None
            else stream.seen
            for stream in streams
        ]
        mask = torch.cat(seen, dim=1)[:, None, None]  # [B, 1, 1, N of all]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)
