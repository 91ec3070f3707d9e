"""RMSNorm against its formula, and its hand-written gradient against autograd of the formula in float64.

The statistics are fp32 by definition, so the comparison is to fp32's precision and not by gradcheck.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_within, rounding
from torch import Tensor

from lorakit.layers import RMSNorm

SHAPES = [(1, 8), (3, 8), (2, 3, 8), (0, 8), (8,), (5, 1)]


def norm(size: int, eps: float = 1e-5) -> RMSNorm:
    layer = RMSNorm(size, eps)
    layer.weight.data = 1 + 0.3 * torch.randn(size)
    return layer.requires_grad_(False)


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def of_value(y: Tensor) -> Tensor:
    """How far the value may be off: half the roundings of a sum of squares, as its root is taken, and six besides."""
    return rounding(y.shape[-1] // 2 + 6, y.detach().abs())


def of_gradient(x: Tensor, dy: Tensor, layer: RMSNorm) -> Tensor:
    """How far dx = rstd·(g - x̂·mean(g·x̂)) may be off: the sums of x² and of g·x̂, and ten roundings besides."""
    x, g = x.detach().double(), (dy * layer.weight).double().abs()
    rstd = (x.square().mean(-1, keepdim=True) + layer.eps).rsqrt()
    normed = (x * rstd).abs()
    return rounding(2 * x.shape[-1] + 10, rstd * (g + normed * (g * normed).mean(-1, keepdim=True)))


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_are_those_of_the_formula(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = norm(shape[-1])
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    wide = x.detach().double().requires_grad_()
    expected = formula(wide, layer.weight.double(), layer.eps)
    y = layer(x)
    y.backward(dy)
    expected.backward(dy.double())
    assert_within(y, expected, of_value(expected))
    assert_within(x.grad, wide.grad, of_gradient(x, dy, layer))


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e3, 1e15])
def test_tiny_and_huge_inputs_stay_finite(scale: float) -> None:
    torch.manual_seed(1)
    layer = norm(16)
    x = (scale * torch.randn(4, 16)).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, expected = layer(x), formula(wide, layer.weight.double(), layer.eps)
    y.sum().backward()
    expected.sum().backward()
    assert_within(y, expected, of_value(expected))
    assert_within(x.grad, wide.grad, of_gradient(x, torch.ones(4, 16), layer))


def test_zeros_have_a_finite_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    norm(4)(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_where_transformers_does(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    layer = norm(64).to(dtype)
    x = torch.randn(32, 64, dtype=dtype)
    wide = x.float()
    theirs = layer.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + layer.eps)).to(dtype)
    assert torch.equal(layer(x), theirs)
    assert layer(x).dtype == dtype


def test_frozen_and_trained_norms_agree_and_only_the_trained_one_gets_a_gradient() -> None:
    torch.manual_seed(3)
    layer = norm(8)
    x = torch.randn(3, 8, requires_grad=True)
    dy = torch.randn(3, 8)
    frozen, (dx,) = layer(x), torch.autograd.grad(layer(x), x, dy)
    assert layer.weight.grad is None
    layer.requires_grad_(True)
    trained, (dx_trained, dw) = layer(x), torch.autograd.grad(layer(x), [x, layer.weight], dy)
    assert torch.equal(frozen, trained)
    assert torch.equal(dx, dx_trained)
    products = dy.double() * formula(x.double(), torch.ones(8).double(), layer.eps)
    assert_within(dw, products.sum(0), rounding(8 + 6 + 3, products.abs().sum(0)))  # x², value, tokens


def test_x_is_saved_in_its_own_dtype() -> None:
    layer = norm(64).bfloat16()
    x = torch.randn(16, 64, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert sum(t.nbytes for t in saved) == 16 * 64 * 2 + 16 * 4 + 64 * 2  # x in bf16, rstd in fp32, the weight
