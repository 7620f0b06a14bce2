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
        return _turn_back(gradients[0], *ctx.saved_tensors), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    values = x.float()
    if torch.compiler.is_compiling():  # graphs have no complex numbers, and fuse these passes
        first, second = values.unflatten(-1, (-1, 2)).unbind(-1)
        crossed = torch.stack((-second, first), dim=-1).flatten(-2)
        return (crossed * sin + values * cos).type_as(x)
    # (a + ib) * i sin: its products with zero are exact, so it rounds as -b sin and a sin do, in one pass.
    quarter_turn = torch.complex(sin.new_zeros(()), sin[..., ::2])
    crossed = torch.view_as_real(_as_complex(values) * quarter_turn).flatten(-2)
    return crossed.add_(values * cos).type_as(x)


def _turn_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The opposite rotation, which is the gradient's."""
    if torch.compiler.is_compiling():
        return _turn(x, cos, -sin)
    # In one pass: nobody's rounding is to be met here.
    turns = torch.complex(cos[..., ::2], -sin[..., ::2])
    return torch.view_as_real(_as_complex(x.float()) * turns).flatten(-2).type_as(x)


def _as_complex(x: Tensor) -> Tensor:
    """Adjacent pairs of x [..., D] as complex numbers [..., D / 2]; copied only where its layout has no such view."""
    *strides, last = x.stride()
    if last != 1 or x.storage_offset() % 2 or any(stride % 2 for stride in strides):
        x = x.contiguous()
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
