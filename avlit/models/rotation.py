"""Turning pairs of features by a token's angles: what rotary positions do to queries and keys."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of x [..., S, D] by the angles whose cosines and sines are [S, D], in float32.

    Angles get no gradient.
    """
    return RotatedPairs.apply(x, cos, sin)  # pyright: ignore[reportReturnType]


class RotatedPairs(torch.autograd.Function):
    """The rotation, whose gradient is turned back: autograd would split and stack the halves once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `rotate_pairs`."""
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Of x alone."""
        cos, sin = ctx.saved_tensors
        return _turn(gradients[0], cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    values = x.float()
    first, second = values.unflatten(-1, (-1, 2)).unbind(-1)
    if torch.compiler.is_compiling():  # a graph would break at what is written into a slice, and needs no such help
        crossed = torch.stack((-second, first), dim=-1).flatten(-2)
        return (crossed * sin + values * cos).type_as(x)
    crossed = torch.empty_like(values)  # each pair (a, b) as (-b, a)
    crossed_first, crossed_second = crossed.unflatten(-1, (-1, 2)).unbind(-1)
    torch.neg(second, out=crossed_first)
    crossed_second.copy_(first)
    return crossed.mul_(sin).add_(values * cos).type_as(x)
