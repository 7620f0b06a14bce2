"""A dual-stream and a single-stream block of the twin MM-DiT, where video, sound and their texts meet (JoVA, Eq. 4).

HunyuanVideoTransformer3DModel's blocks run submodule by submodule, for two branches whose attention is shared. A branch
holds N tokens of latents and S of its text; alone, or with attention kept apart, it computes what the stock blocks do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from avlit.models.backbones import Rotary, Stock
from avlit.models.joint_attention import Heads, Mode, joint_attention, project_heads
from avlit.models.mst_controlnet import split_heads
from avlit.models.rotation import rotate_pairs
from avlit.models.sizes import Fusion
from avlit.models.twin_block import BlockObserve


@dataclass(frozen=True)
class Branch:
    """What stays the same for one branch through all blocks.

    twin: its transformer; num_tokens: N. temb [B, D], of time and pooled text. rotary: [N + S, head] twice, text
    unturned. seen [B, N + S] bool, False for padded text; None if there is none.
    """

    twin: Stock
    num_tokens: int
    temb: Tensor
    rotary: Rotary
    seen: Tensor | None


@dataclass(frozen=True)
class Meeting:
    """How branches see each other in one block: `fusion` is the model's, `mode` the call's; observe is told of it.

    adapters: of each branch, the linear layer of this block (fusion "cross_linear"), else none. They are units of the
    layer, gathered with it: their own hooks would break a compiled layer in two.
    """

    fusion: Fusion
    mode: Mode
    observe: BlockObserve | None
    adapters: Sequence[Stock] = ()


def dual_block(
    blocks: Sequence[Stock], branches: Sequence[Branch], meeting: Meeting, *tokens: Tensor
) -> tuple[Tensor, ...]:
    """HunyuanVideoTransformerBlock.forward of every branch, whose blocks these are.

    tokens: latents [B, N, D] and text [B, S, D] of the first branch, then those of the second.
    """
    pairs = list(zip(tokens[::2], tokens[1::2], strict=True))
    modulations, heads = [], []
    for block, branch, (x, text) in zip(blocks, branches, pairs, strict=True):
        normed, *modulation = block.norm1(x, emb=branch.temb)
        normed_text, *text_modulation = block.norm1_context(text, emb=branch.temb)
        modulations.append((modulation, text_modulation))
        of_latents, of_text = project_heads(block.attn, normed, None), project_text(block.attn, normed_text)
        heads.append(
            Heads(
                query=rotate_pairs(torch.cat((of_latents.query, of_text.query), dim=2), *branch.rotary),
                key=rotate_pairs(torch.cat((of_latents.key, of_text.key), dim=2), *branch.rotary),
                value=torch.cat((of_latents.value, of_text.value), dim=2),
                seen=branch.seen,
            )
        )
    gathered = fuse(branches, heads, meeting)  # [B, N + S, D] each

    out: list[Tensor] = []
    for block, branch, pair, both, own, found in zip(
        blocks, branches, pairs, modulations, heads, gathered, strict=True
    ):
        found = found.to(own.query.dtype)  # float32 under autocast, as in the stock block, whose rounding it decides
        attended, attended_text = found[:, : branch.num_tokens], found[:, branch.num_tokens :]
        out.append(_residual(pair[0], block.attn.to_out[0](attended), block.norm2, block.ff, both[0]))
        out.append(
            _residual(pair[1], block.attn.to_add_out(attended_text), block.norm2_context, block.ff_context, both[1])
        )
    return tuple(out)


def single_block(
    blocks: Sequence[Stock], branches: Sequence[Branch], meeting: Meeting, *tokens: Tensor
) -> tuple[Tensor, ...]:
    """HunyuanVideoSingleTransformerBlock.forward of every branch, whose blocks these are.

    tokens: [B, N + S, D] of each branch, its latents before its text.
    """
    heads, gates, hidden = [], [], []
    for block, branch, x in zip(blocks, branches, tokens, strict=True):
        normed, gate = block.norm(x, emb=branch.temb)
        heads.append(replace(project_heads(block.attn, normed, branch.rotary), seen=branch.seen))
        gates.append(gate[:, None])  # [B, 1, D]
        hidden.append(block.act_mlp(block.proj_mlp(normed)))
    gathered = fuse(branches, heads, meeting)
    return tuple(
        gate * block.proj_out(torch.cat((found, mlp), dim=2)) + x
        for block, x, gate, found, mlp in zip(blocks, tokens, gates, gathered, hidden, strict=True)
    )


def project_text(attention: Stock, tokens: Tensor) -> Heads:
    """Text [B, S, D] through the projections and norms that a dual block's attention has for it."""
    return Heads(
        query=split_heads(attention.add_q_proj(tokens), attention.heads, attention.norm_added_q),
        key=split_heads(attention.add_k_proj(tokens), attention.heads, attention.norm_added_k),
        value=attention.add_v_proj(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2),
    )


def fuse(branches: Sequence[Branch], heads: Sequence[Heads], meeting: Meeting) -> tuple[Tensor, ...]:
    """What the tokens of each branch gather, [B, N + S, D], before the output projections (JoVA, Eq. 4 and Table 5).

    joint: all tokens attend to all. cross: each branch attends to itself, and its latents to the other's latents with
    the same queries, keys and values; the two answers are added. cross_linear: the second one passes a linear layer
    before. Chosen, since the paper has a drawing of these only: text takes no part in the second attention, and the sum
    comes before the output projection, which both share.
    """
    if meeting.observe is not None:
        latents = [_latents(each, branch) for each, branch in zip(heads, branches, strict=True)]
        text = [_slice(each, branch.num_tokens, None) for each, branch in zip(heads, branches, strict=True)]
        meeting.observe([*latents, *text])
    if meeting.fusion == "joint" or meeting.mode == "separate" or len(branches) == 1:
        return joint_attention(heads, mode=meeting.mode)
    video, audio = (_latents(each, branch) for each, branch in zip(heads, branches, strict=True))
    of_video, of_audio = joint_attention(heads, mode="separate")
    of_audio = of_audio + _cross(1, branches, meeting, audio, video, of_audio)
    if meeting.mode == "joint":
        of_video = of_video + _cross(0, branches, meeting, video, audio, of_video)
    return of_video, of_audio


def _cross(place: int, branches: Sequence[Branch], meeting: Meeting, own: Heads, other: Heads, like: Tensor) -> Tensor:
    """What the latents of branch `place` gather from the other's, zero for text: [B, N + S, D], as `like`."""
    gathered = F.scaled_dot_product_attention(own.query, other.key, other.value).transpose(1, 2).flatten(2)
    if meeting.adapters:
        gathered = meeting.adapters[place].forward(gathered)
    return F.pad(gathered, (0, 0, 0, like.shape[1] - branches[place].num_tokens))


def _latents(heads: Heads, branch: Branch) -> Heads:
    return _slice(heads, 0, branch.num_tokens)


def _slice(heads: Heads, start: int, stop: int | None) -> Heads:
    seen = None if heads.seen is None else heads.seen[:, start:stop]
    return Heads(heads.query[:, :, start:stop], heads.key[:, :, start:stop], heads.value[:, :, start:stop], seen)


def _residual(x: Tensor, attended: Tensor, norm: Stock, feed_forward: Stock, modulation: Sequence[Tensor]) -> Tensor:
    """x [B, N, D] with what attention found, then through the feed-forward; modulation: four of [B, D]."""
    gate, shift, scale, out_gate = (each[:, None] for each in modulation)  # [B, 1, D]
    x = x + attended * gate
    return x + out_gate * feed_forward(norm(x) * (1 + scale) + shift)
