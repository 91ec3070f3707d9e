"""SwiGLU against its formula, and its hand-written gradient against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from lorakit_kernels import swiglu
from tolerances import assert_within, rounding
from torch import Tensor


def formula(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def test_gradcheck_in_float64() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))


@pytest.mark.parametrize("shape", [(1,), (0, 4), (3, 4), (2, 3, 4)])
def test_value_is_the_formula_and_the_inputs_are_left_alone(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    gate, up = torch.randn(shape), torch.randn(shape)
    copies = gate.clone(), up.clone()
    expected = formula(gate.double(), up.double())
    assert_within(swiglu(gate, up), expected, rounding(6, expected.abs()))  # e^x (two), 1 + e^x, quotient, product
    assert torch.equal(gate, copies[0]) and torch.equal(up, copies[1])


def test_backward_leaves_the_inputs_and_the_incoming_gradient_alone() -> None:
    torch.manual_seed(2)
    gate, up, dy = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)
    copies = [t.detach().clone() for t in (gate, up, dy)]
    y = swiglu(gate, up)
    first = torch.autograd.grad(y, [gate, up], dy, retain_graph=True)
    second = torch.autograd.grad(y, [gate, up], dy)
    assert all(torch.equal(t, copy) for t, copy in zip((gate, up, dy), copies, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("value", [-1e4, -100.0, 100.0, 1e4])
def test_saturated_gates_stay_finite(value: float) -> None:
    gate = torch.full((3,), value, requires_grad=True)
    up = torch.ones(3, requires_grad=True)
    y = swiglu(gate, up)
    y.sum().backward()
    least = abs(value) * math.exp(-87)  # where the exponential of a backend may end
    assert_within(y, torch.full((3,), max(0.0, value)), least)
    assert_within(gate.grad, torch.full((3,), float(value > 0)), least)


@pytest.mark.parametrize("frozen", ["gate", "up"])
def test_one_input_may_be_frozen(frozen: str) -> None:
    inputs = {name: torch.randn(2, 3, requires_grad=name != frozen) for name in ("gate", "up")}
    swiglu(inputs["gate"], inputs["up"]).sum().backward()
    assert inputs[frozen].grad is None
    assert all(t.grad is not None for name, t in inputs.items() if name != frozen)


def test_saves_gate_and_up_alone_in_bfloat16() -> None:
    gate, up = (torch.randn(8, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = swiglu(gate, up)
    assert y.dtype == torch.bfloat16
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}
