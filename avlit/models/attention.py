"""Which library computes scaled dot-product attention inside a model's layers, stock blocks included."""

from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.overrides import TorchFunctionMode

Attention = Literal["sdpa", "flash_attn", "flex"]


def has_flash_attn() -> bool:
    """Whether flash-attn can be imported."""
    return find_spec("flash_attn") is not None


class AttentionMode(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` is computed by `backend`, where that can; else by torch, as outside.

    flash_attn: half precision on a GPU without a mask, heads up to 256 wide. flex: without a mask, or with one that
    leaves out keys of a clip, bool [B, 1, 1, keys]. Neither takes dropout.
    """

    def __init__(self, backend: Attention):
        super().__init__()
        self.backend: Attention = backend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _attend(self.backend, *args, **(kwargs or {}))


def _attend(
    backend: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Queries [B, H, N, D], keys and values [B, H, M, D] -> [B, H, N, D]."""
    is_plain = not (dropout_p or is_causal or enable_gqa) and query.ndim == 4
    if is_plain and backend == "flash_attn" and attn_mask is None and _suits_flash(query):
        from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

        query, key, value = (each.transpose(1, 2) for each in (query, key, value))  # [B, N, H, D]
        return flash_attn_func(query, key, value, softmax_scale=scale).transpose(1, 2)
    if is_plain and backend == "flex" and (attn_mask is None or _leaves_out_keys(attn_mask)):
        with torch._C.DisableTorchFunction():
            return _flex(query, key, value, attn_mask, scale)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _suits_flash(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256


def _leaves_out_keys(mask: Tensor) -> bool:
    return mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    block_mask = None
    if mask is not None:
        seen = mask[:, 0, 0].expand(query.shape[0], -1)  # [B, M]
        block_mask = create_block_mask(
            lambda b, h, q, k: seen[b, k], len(query), None, query.shape[2], key.shape[2], device=query.device
        )
    return _compiled_flex()(query, key, value, block_mask=block_mask, scale=scale)


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)
