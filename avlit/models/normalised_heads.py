"""Queries and keys on their way from a projection to attention: normalised, split into heads, rotated."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from avlit.models.backbones import Rotary, Stock
from avlit.models.rotation import rotate_pairs, turn, turn_back


def split_heads(x: Tensor, heads: int, norm: Stock, rotary: Rotary | None = None) -> Tensor:
    """[B, S, D] -> normalised heads [B, H, S, D/H]; CogVideoX normalises each head, Wan the full width.

    rotary: cosines and sines [S, D/H] of adjacent pairs (see `rotate_pairs`); None leaves them where they are.
    """
    of_head = norm.weight.shape[-1] != x.shape[-1]
    # Compilers fuse the norm and its gradient, and CUDA has kernels for them; for a CPU there are single steps only.
    is_plain = x.is_cpu and x.dtype == norm.weight.dtype == torch.float32 and not torch.compiler.is_compiling()
    if is_plain and isinstance(norm, nn.RMSNorm) and not of_head:
        return NormalisedHeads.apply(x, norm.weight, norm.eps, heads, rotary)  # pyright: ignore[reportReturnType]
    x = norm(x.unflatten(-1, (heads, -1))) if of_head else norm(x).unflatten(-1, (heads, -1))
    x = x.transpose(1, 2)
    return x if rotary is None else rotate_pairs(x, *rotary)


class NormalisedHeads(torch.autograd.Function):
    """RMSNorm over the full width and rotation, rounded as the two are, under one gradient of few passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, heads: int, rotary: Rotary | None) -> Tensor:
        """See `split_heads`."""
        y = x.square()
        inverse = y.mean(-1, keepdim=True).add_(eps).rsqrt_()  # [B, S, 1], of the root mean square
        ctx.save_for_backward(x, weight, inverse, *(rotary or ()))
        y = torch.mul(x, inverse, out=y).mul_(weight).unflatten(-1, (heads, -1)).transpose(1, 2)
        return y if rotary is None else turn(y, *rotary)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Of x and of the weight.

        With r = 1 / rms(x), y = r w x: dL/dw sums r x dL/dy over tokens, dL/dx = r (w dL/dy - r x mean(r w x dL/dy)).
        """
        x, weight, inverse, *rotary = ctx.saved_tensors
        gradient = turn_back(gradients[0], *rotary) if rotary else gradients[0]
        gradient = gradient.transpose(1, 2).flatten(2)  # [B, S, D]
        product = (gradient * x).mul_(inverse).flatten(0, 1)  # [B * S, D]
        of_weight = product.sum(0)
        total = product.mv(weight).view_as(inverse)
        of_x = torch.mul(gradient, weight, out=product.view_as(x))  # one buffer: the fewer, the more stay in cache
        of_x.addcmul_(x, total.mul_(inverse), value=-1 / weight.shape[0]).mul_(inverse)
        return of_x, of_weight, None, None, None
