"""One block of the twin Wan transformers, and what surrounds the blocks: time embedding and head.

WanTransformer3DModel.forward run submodule by submodule, for several streams of tokens whose self-attention is shared.
N tokens of a stream, R of the reference sound. A time is one for each clip or one for each of G equal runs of a clip's
tokens: of a latent frame, say, or of a single token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avlit.models.backbones import Rotary, Stock, add_gated, affine, wan_time
from avlit.models.joint_attention import Heads, Mode, joint_attention, project_heads
from avlit.models.mst_controlnet import split_heads

Observe = Callable[[int, Sequence[Heads]], None]
"""(layer, what each stream brings to that block's self-attention), as for attention maps."""
BlockObserve = Callable[[Sequence[Heads]], None]
"""The same of one block: layers that are told no number share a compiled graph."""


@dataclass(frozen=True)
class Stream:
    """What stays the same for one stream through all blocks.

    twin: its transformer; references: its second key and value sets, one a block. text [B, L_text, D]. temb [B, 1, D]
    or [B, G, 1, D] and modulation [B, 1, 6, D] or [B, G, 1, 6, D]. rotary: [tokens, head] twice.
    """

    twin: Stock
    references: nn.ModuleList
    text: Tensor
    temb: Tensor
    modulation: Tensor
    rotary: Rotary


class ReferenceAttention(nn.Module):
    """A second key and value set of a text cross-attention, for reference sound (UniTalking, sec. 4.4).

    Values start at zero, so that the stream starts from what it does without a reference (chosen).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.norm_k = nn.RMSNorm(width, eps=1e-6)
        nn.init.zeros_(self.to_v.weight)
        nn.init.zeros_(self.to_v.bias)

    def forward(self, query: Tensor, reference: Tensor) -> Tensor:
        """Query [B, heads, N, head] of the text's attention, reference [B, R, D] -> [B, heads, N, head]."""
        key = split_heads(self.to_k(reference), query.shape[1], self.norm_k)
        value = self.to_v(reference).unflatten(-1, (query.shape[1], -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value)


def embed_time(twin: Stock, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Timesteps [B] or [B, G] -> embedding [B, 1, D] or [B, G, 1, D], modulation [B, 1, 6, D] or [B, G, 1, 6, D]."""
    embedder = twin.condition_embedder
    temb = wan_time(twin, timestep.flatten(), dtype).unflatten(0, timestep.shape)  # [B, D] or [B, G, D]
    modulation = embedder.time_proj(embedder.act_fn(temb)).unflatten(-1, (6, -1))
    return temb[..., None, :], modulation[..., None, :, :]


def attend_conditions(attention: Stock, x: Tensor, text: Tensor, reference: Tensor, added: Stock) -> Tensor:
    """Tokens x [B, N, D] read text and reference [B, R, D]; the two answers are summed (UniTalking, 4.4).

    `added` is a unit of the layer, gathered with it: its own hooks would break a compiled layer in two.
    """
    query = split_heads(attention.to_q(x), attention.heads, attention.norm_q)  # [B, heads, N, head]
    key = split_heads(attention.to_k(text), attention.heads, attention.norm_k)
    value = attention.to_v(text).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    out = F.scaled_dot_product_attention(query, key, value) + added.forward(query, reference)
    return attention.to_out[0](out.transpose(1, 2).flatten(2))


def twin_block(
    blocks: Sequence[Stock],
    references: Sequence[Stock],
    streams: Sequence[Stream],
    reference: Tensor,
    mode: Mode | Sequence[Mode],
    observe: BlockObserve | None,
    *tokens: Tensor,
) -> tuple[Tensor, ...]:
    """One block of every stream: WanTransformerBlock.forward with the self-attention shared by the streams.

    blocks, references: each stream's block and second key and value set. tokens: each stream's [B, N, D], in the order
    of streams; reference [B, R, D].
    """
    tables = [
        (block.scale_shift_table + stream.modulation.float()).unbind(-2)
        for block, stream in zip(blocks, streams, strict=True)
    ]
    heads = []
    for block, stream, table, x in zip(blocks, streams, tables, tokens, strict=True):
        shift, scale, *_ = table
        normed = affine(block.norm1(x.float()), 1 + scale, shift).type_as(x)
        heads.append(project_heads(block.attn1, normed, stream.rotary))
    if observe is not None:
        observe(heads)
    attended = joint_attention(heads, mode=mode)  # [B, N, D] each

    out = []
    for block, added, stream, table, x, gathered in zip(
        blocks, references, streams, tables, tokens, attended, strict=True
    ):
        _, _, gate, shift, scale, ffn_gate = table
        x = add_gated(x.float(), gate, block.attn1.to_out[0](gathered)).type_as(x)
        normed = block.norm2(x.float()).type_as(x)
        x = x + attend_conditions(block.attn2, normed, stream.text, reference, added)
        normed = affine(block.norm3(x.float()), 1 + scale, shift).type_as(x)
        out.append(add_gated(x.float(), ffn_gate, block.ffn(normed).float()).type_as(x))
    return tuple(out)


def project_out(stream: Stream, x: Tensor) -> Tensor:
    """Wan's head: tokens [B, N, D] -> [B, N, C * p * p]."""
    shift, scale = (stream.twin.scale_shift_table + stream.temb[..., None, :]).unbind(-2)  # [B, 1, D] or [B, G, 1, D]
    return stream.twin.proj_out(affine(stream.twin.norm_out(x.float()), 1 + scale, shift).type_as(x))
