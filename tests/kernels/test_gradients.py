"""Gradients of the registered operations: against autograd of the formula, and by PyTorch's own checks."""

from __future__ import annotations

from typing import Any

import lorakit_kernels as kernels
import pytest
import torch
from lorakit_kernels import Weight4bit
from tolerances import assert_alike, assert_within, rounding
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap
from torch.library import opcheck

from lorakit import quantize
from lorakit.layers import rope_frequencies, rope_tables

DOUBLE = {"dtype": torch.float64, "requires_grad": True}


def operand(double_quant: bool) -> Weight4bit:
    torch.manual_seed(0)
    return quantize(torch.randn(4, 64), double_quant=double_quant).operand


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_lora", [True, False])
def test_linear(double_quant: bool, with_bias: bool, with_lora: bool) -> None:
    weight = operand(double_quant)
    inputs = [torch.randn(2, 3, 64, **DOUBLE)]
    inputs += [torch.randn(4, **DOUBLE)] if with_bias else []
    inputs += [torch.randn(2, 3, 5, **DOUBLE), torch.randn(4, 5, **DOUBLE)] if with_lora else []

    def forward(x: Tensor, *rest: Tensor) -> Tensor:
        bias = rest[0] if with_bias else None
        return kernels.linear_4bit(x, weight, bias, list(rest[int(with_bias) :]), 0.5)

    assert gradcheck(forward, inputs)
    assert not with_lora or gradgradcheck(forward, inputs)


@pytest.mark.parametrize("with_lora", [True, False])
def test_linear_dx(with_lora: bool) -> None:
    weight = operand(True)
    inputs = [torch.randn(2, 4, **DOUBLE)]
    inputs += [torch.randn(2, 5, **DOUBLE), torch.randn(5, 64, **DOUBLE)] if with_lora else []
    assert gradcheck(lambda dy, *lora: kernels.linear_4bit_dx(dy, weight, list(lora)), inputs)


@pytest.mark.parametrize("trained", [True, False])
def test_rms_norm_and_its_weight(trained: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(8, requires_grad=trained)
    wide, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_(trained)
    dy = torch.randn(2, 5, 8)
    kernels.rms_norm(x, weight, 1e-5)[0].backward(dy)
    (wide_weight * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()).backward(dy.double())
    # As in tests/layers/frozen/test_norm.py: two sums over 8, ten roundings besides.
    # The weight: half of one, six, ten rows.
    exact = x.detach().double()
    rstd = (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    g, normed = (dy * weight.detach()).double().abs(), (exact * rstd).abs()
    magnitude = rstd * (g + normed * (g * normed).mean(-1, keepdim=True))
    assert_within(x.grad, wide.grad, rounding(2 * 8 + 10, magnitude))
    if trained:
        of_weight = (dy.double().abs() * normed).sum((0, 1))
        assert_within(weight.grad, wide_weight.grad, rounding(8 // 2 + 6 + 10, of_weight))


@pytest.mark.parametrize("backward", [True, False])
def test_rope(backward: bool) -> None:
    cos, sin = rope_tables(rope_frequencies(8, 100.0), torch.arange(3), torch.float64)
    q, k = torch.randn(3, 2, 8, **DOUBLE), torch.randn(3, 1, 8, **DOUBLE)
    assert gradcheck(lambda q, k: kernels.rope(q, k, cos, sin, backward), (q, k))


def test_swiglu() -> None:
    assert gradcheck(kernels.swiglu, (torch.randn(3, 8, **DOUBLE), torch.randn(3, 8, **DOUBLE)))


def every_operation() -> dict[str, tuple[Any, ...]]:
    """Return functions of tensors that each call one operation: name -> (function, tensors)."""
    torch.manual_seed(0)
    weight, tables = operand(True), rope_tables(rope_frequencies(8, 100.0), torch.arange(3), torch.float64)
    narrow, wide, targets = (torch.randn(3, 4, **DOUBLE), torch.randn(3, 8, **DOUBLE), torch.tensor([0, 3, 1]))
    x, factors = torch.randn(3, 64, **DOUBLE), [torch.randn(3, 2, **DOUBLE), torch.randn(4, 2, **DOUBLE)]
    back = [torch.randn(3, 2, **DOUBLE), torch.randn(2, 64, **DOUBLE)]
    heads = [torch.randn(3, 2, 8, **DOUBLE), torch.randn(3, 1, 8, **DOUBLE)]
    return {
        "linear_4bit": (lambda x, *lora: kernels.linear_4bit(x, weight, None, lora, 0.5), x, *factors),
        "linear_4bit_dx": (lambda dy, *lora: kernels.linear_4bit_dx(dy, weight, lora), narrow, *back),
        "add_linear_4bit_dx": (lambda dx, dy: _added(dx.clone(), dy, weight), x, narrow),
        "rms_norm": (lambda x, w: kernels.rms_norm(x, w, 1e-5)[0], wide, torch.randn(8, **DOUBLE)),
        "rope": (lambda q, k: kernels.rope(q, k, *tables), *heads),
        "swiglu": (kernels.swiglu, wide, torch.randn(3, 8, **DOUBLE)),
        "swiglu_backward": (kernels.swiglu_backward, *(torch.randn(2, 3, **DOUBLE) for _ in range(3))),
        "drop": (lambda x: kernels.drop(x, torch.tensor(5), 0.4), wide),
        "cross_entropy": (lambda x: kernels.cross_entropy(x, targets, False), wide),
    }


def _added(dx: Tensor, dy: Tensor, weight: Weight4bit) -> Tensor:
    kernels.add_linear_4bit_dx(dx, dy, weight)
    return dx


@pytest.mark.parametrize("name", every_operation())
def test_derivatives_of_every_order_and_mode(name: str) -> None:
    function, *tensors = every_operation()[name]
    batched = name != "add_linear_4bit_dx"
    forward = {"check_forward_ad": True, "check_batched_forward_grad": True}
    forward_over = {"check_fwd_over_rev": True, "check_rev_over_rev": False, "check_undefined_grad": False}
    assert gradcheck(function, tensors, check_batched_grad=batched, **forward)
    assert gradgradcheck(function, tensors, check_batched_grad=batched)
    assert gradgradcheck(function, tensors, **forward_over)


@pytest.mark.parametrize("name", every_operation())
def test_samples_under_vmap(name: str) -> None:
    function, *tensors = every_operation()[name]

    def loss(*tensors: Tensor) -> Tensor:
        results = function(*tensors)
        return sum(result.sin().sum() for result in ((results,) if isinstance(results, Tensor) else results))

    stacks = [torch.stack([tensor.detach(), 2 * tensor.detach()]) for tensor in tensors]
    found = vmap(grad(loss, argnums=tuple(range(len(tensors)))))(*stacks)
    for index in (0, 1):
        given = [stack[index].clone().requires_grad_() for stack in stacks]
        assert_alike([one[index] for one in found], list(torch.autograd.grad(loss(*given), given)), 200)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_pytorch_accepts_the_gradients(backend: str, double_quant: bool) -> None:
    weight = operand(double_quant)
    x, bias = torch.randn(2, 3, 64, requires_grad=True), torch.randn(4, requires_grad=True)
    factors = [torch.randn(2, 3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)]
    rotated = torch.randn(3, 2, 8, requires_grad=True)
    tables = rope_tables(rope_frequencies(8, 100.0), torch.arange(3), torch.float32)
    with kernels.use_backend(backend):
        opcheck(torch.ops.lorakit.linear_4bit.default, (x, *weight, bias, factors, 0.5))
        opcheck(torch.ops.lorakit.linear_4bit_dx.default, (torch.randn(2, 4, requires_grad=True), *weight, []))
        opcheck(torch.ops.lorakit.rms_norm.default, (x, torch.randn(64, requires_grad=True), 1e-5))
        opcheck(torch.ops.lorakit.rope.default, (rotated, rotated.detach(), *tables, False))
        opcheck(torch.ops.lorakit.swiglu.default, (x, x.detach()))


def test_compiles_without_graph_breaks_for_dynamic_shapes() -> None:
    weight = operand(True)

    def loss(x: Tensor, u: Tensor, lora_b: Tensor) -> Tensor:
        return kernels.linear_4bit(x, weight, None, [u, lora_b], 2.0).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9, 70):
        inputs = [torch.randn(tokens, 64), torch.randn(tokens, 3), torch.randn(4, 3)]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        expected, found = loss(*inputs), compiled(*inputs)
        assert_alike(found, expected, 64 + 8 + 70)
        for one, other in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
            assert_alike(one, other, 64 + 8 + 70)
