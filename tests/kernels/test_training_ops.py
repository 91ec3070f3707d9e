"""The registered operations of a training step: PyTorch's own checks, torch.compile, and which backend computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lorakit_kernels as kernels
import pytest
import torch
from lorakit_kernels import dispatch, reference, swiglu
from tolerances import assert_alike, assert_within, rounding
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import cross_entropy

from lorakit.layers import RMSNorm, apply_rope, linear_cross_entropy, rope_frequencies, rope_tables


def arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments for each operation but AdamW's, which has its own tests."""
    x, weight, dy = torch.randn(3, 5, 8, dtype=dtype), torch.randn(8), torch.randn(3, 5, 8, dtype=dtype)
    tables = rope_tables(rope_frequencies(8, 100.0), torch.arange(3), dtype)
    rstd = reference.rms_norm(x, weight, 1e-5)[1]
    return {
        "rms_norm": (x, weight, 1e-5),
        "rms_norm_backward": (dy, x, weight, rstd),
        "rope": (x, dy[:, :2], *tables, True),
        "swiglu": (x, dy),
        "swiglu_backward": (dy, x, dy),
        "drop": (x, torch.tensor(11), 0.3),
        "cross_entropy": (x.view(15, 8).clone(), torch.arange(15) % 8, True),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", arguments(torch.float32))
def test_pytorch_accepts_the_operation(operation: str, dtype: torch.dtype) -> None:
    opcheck(getattr(torch.ops.lorakit, operation).default, arguments(dtype)[operation])


def step(norm: RMSNorm, x: Tensor, tables: tuple[Tensor, Tensor], head: Tensor, targets: Tensor) -> Tensor:
    """A loss that goes through every layer with an operation here."""
    y = swiglu(norm(x), x)
    q, k = apply_rope(y.view(len(x), -1, 8), y.view(len(x), -1, 8), *tables)
    return linear_cross_entropy((q + k).view(x.shape), head, targets)


def test_layers_compile_forward_and_backward_without_graph_breaks() -> None:
    torch.manual_seed(0)
    norm, head = RMSNorm(16, 1e-5).requires_grad_(False), torch.randn(11, 16)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (6, 9, 20):
        x, targets = torch.randn(tokens, 16, requires_grad=True), torch.arange(tokens) % 11
        tables = rope_tables(rope_frequencies(8, 100.0), torch.arange(tokens), torch.float32)
        losses, gradients = [], []
        for function in (step, compiled):
            losses.append(function(norm, x, tables, head, targets))
            gradients.append(torch.autograd.grad(losses[-1], x)[0])
        terms = 16 // 2 + 16 + 11 + tokens + 40  # the norm, the head, the softmax, the loss, and the functions
        assert_alike(*losses, terms)
        assert_alike(*gradients, terms)


def test_overwriting_the_logits_is_noticed_by_autograd() -> None:
    logits = torch.randn(4, 5)
    product = (torch.randn(4, 5, requires_grad=True) * logits).sum()
    kernels.cross_entropy(logits.clone(), torch.arange(4), True)
    kernels.cross_entropy(logits, torch.arange(4), False)
    kept = logits.clone()
    product.backward(retain_graph=True)
    assert torch.equal(logits, kept)
    kernels.cross_entropy(logits, torch.arange(4), True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [50, 1 << 20])  # a million terms: one fp32 accumulator a lane is not enough
def test_cross_entropy_is_torchs_and_leaves_its_gradient(dtype: torch.dtype, vocabulary: int) -> None:
    logits, targets = (3 * torch.randn(6, vocabulary)).to(dtype), torch.arange(6) * 9
    wide = logits.detach().double().requires_grad_()
    expected = cross_entropy(wide, targets, reduction="none")
    expected.sum().backward()
    # The logits less their maximum, the exponential (two units), the sum in pairs (a unit), its logarithm, the loss.
    of_loss = rounding(8, wide.abs().amax(1) + expected)
    probabilities = wide.softmax(-1)
    assert_within(kernels.cross_entropy(logits, targets, True), expected, of_loss)
    of_gradient = of_loss[:, None] * probabilities + rounding(8, probabilities) + rounding(1, wide.grad.abs(), dtype)
    assert_within(logits, wide.grad, of_gradient + torch.finfo(dtype).smallest_normal)  # below it, C++ may have zero


def test_a_backend_computes_what_it_has_and_the_definition_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def own(gate: Tensor, up: Tensor) -> Tensor:
        calls.append(gate.dtype)
        return reference.swiglu(gate, up)

    monkeypatch.setattr(dispatch, "backend", lambda device: SimpleNamespace(swiglu=own))
    for dtype in (torch.float32, torch.float64):  # the latter is always the definition's
        given = arguments(dtype)["swiglu"]
        assert torch.equal(kernels.swiglu(*given), reference.swiglu(*given))
    kernels.rms_norm(*arguments(torch.float32)["rms_norm"])
    assert calls == [torch.float32]
