from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from avlit.models.normalised_heads import NormalisedHeads, split_heads
from avlit.models.rotation import rotate_pairs

HEADS = 3


def wide_norm() -> nn.RMSNorm:
    norm = nn.RMSNorm(72, eps=1e-6)
    nn.init.normal_(norm.weight, 1, 0.3)
    return norm


def angles(num_tokens: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, 24] of adjacent pairs."""
    found = 6 * torch.rand(num_tokens, 12)
    return found.cos().repeat_interleave(2, dim=1), found.sin().repeat_interleave(2, dim=1)


def step_by_step(x: Tensor, norm: nn.Module, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    heads = norm(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return heads if rotary is None else rotate_pairs(heads, *rotary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_rotated", [False, True])
def test_heads_are_those_of_the_norm_then_the_rotation_bit_for_bit(dtype, is_rotated):
    x, norm, rotary = torch.randn(2, 7, 72).to(dtype), wide_norm().to(dtype), angles(7) if is_rotated else None
    before = x.clone()
    found = split_heads(x, HEADS, norm, rotary)
    assert found.shape == (2, HEADS, 7, 24)
    assert torch.equal(found, step_by_step(x, norm, rotary))
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", [0.02, 1.0, 30.0])
@pytest.mark.parametrize("is_rotated", [False, True])
def test_gradients_are_as_exact_as_those_of_the_steps(is_rotated, size):
    x, norm, rotary = (size * torch.randn(2, 50, 72)).requires_grad_(), wide_norm(), angles(50) if is_rotated else None
    incoming = torch.randn(2, HEADS, 50, 24)
    found = torch.autograd.grad(split_heads(x, HEADS, norm, rotary), (x, norm.weight), incoming)

    exact_x, exact_weight = (each.detach().double().requires_grad_() for each in (x, norm.weight))
    exact = exact_x * (exact_x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * exact_weight
    exact = exact.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    if rotary is not None:
        cos, sin = (each.double() for each in rotary)
        first, second = exact.unflatten(-1, (-1, 2)).unbind(-1)
        exact = exact * cos + torch.stack((-second, first), dim=-1).flatten(-2) * sin
    expected = torch.autograd.grad(exact, (exact_x, exact_weight), incoming.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=5e-7 * float(b.abs().max()))


def test_the_gradient_is_that_of_finite_differences():
    x, weight = torch.randn(2, 5, 12, dtype=torch.float64), 1 + torch.rand(12, dtype=torch.float64)
    apply: Any = NormalisedHeads.apply
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, weight: apply(x, weight, 0.1, 3, None), inputs)


def test_only_the_input_is_kept_for_the_backward_pass():
    x, norm = torch.randn(2, 40, 72, requires_grad=True), wide_norm()
    kept: list[Tensor] = []

    def keep(each: Tensor) -> Tensor:
        kept.append(each)
        return each

    with saved_tensors_hooks(keep, lambda each: each):
        split_heads(x, HEADS, norm, angles(40))
    assert [each.data_ptr() == x.data_ptr() for each in kept if each.numel() >= x.numel()] == [True]
