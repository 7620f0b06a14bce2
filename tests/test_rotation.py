from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from avlit.models.rotation import rotate_pairs


def angles(num_tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, D] of adjacent pairs."""
    found = 6 * torch.rand(num_tokens, width // 2)
    return found.cos().repeat_interleave(2, dim=1), found.sin().repeat_interleave(2, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["heads first", "as linear layers leave heads", "odd strides"])
def test_pairs_are_turned_as_diffusers_turns_them_bit_for_bit(dtype, layout):
    x, rotary = torch.randn(2, 3, 7, 24).to(dtype), angles(7, 24)
    if layout == "as linear layers leave heads":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "odd strides":
        x = torch.cat((x, x[..., :1]), dim=-1)[..., :24]
    turned = rotate_pairs(x, *rotary)
    assert turned.dtype == dtype
    stock: Any = apply_rotary_emb  # declared for a single tensor of angles
    assert torch.equal(turned, stock(x, rotary))
    assert not torch.equal(turned, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_turned_back(dtype):
    x, rotary = torch.randn(2, 3, 7, 24).to(dtype).requires_grad_(), angles(7, 24)
    incoming = torch.randn(2, 3, 7, 24).to(dtype)
    (found,) = torch.autograd.grad(rotate_pairs(x, *rotary), x, incoming)
    exact = x.detach().double().requires_grad_()
    real, imag = exact.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary[0][:, ::2].double(), rotary[1][:, ::2].double()
    turned = torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1).flatten(-2)
    (expected,) = torch.autograd.grad(turned, exact, incoming.double())
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_turning_leaves_its_input_and_the_angles_alone():
    x, (cos, sin) = torch.randn(1, 2, 5, 8).requires_grad_(), angles(5, 8)
    before = [each.detach().clone() for each in (x, cos, sin)]
    rotate_pairs(x, cos, sin).sum().backward()
    for each, copy in zip((x, cos, sin), before, strict=True):
        assert torch.equal(each, copy)
