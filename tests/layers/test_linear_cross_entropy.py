"""The fused head and loss against torch's cross-entropy over the whole logits: values, gradients, chunk boundaries."""

from __future__ import annotations

import pytest
import torch
from lorakit_kernels import cpu
from lorakit_kernels.dispatch import backend
from torch import Tensor
from torch.nn.functional import cross_entropy

from lorakit.errors import ShapeError
from lorakit.layers import linear_cross_entropy, token_losses

WIDE = 1 << 20  # a vocabulary so large that a chunk holds eight rows


def problem(tokens: int, hidden: int = 6, vocabulary: int = 11, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden, generator=generator).to(dtype)
    return [x, weight, torch.randint(vocabulary, (tokens,), generator=generator)]


@pytest.mark.parametrize(
    ("tokens", "vocabulary"),
    [(1, 11), (5, 11), (7, WIDE), (8, WIDE), (9, WIDE), (17, WIDE), (3, 1), (2, (1 << 23) + 1)],
)
def test_value_and_gradient_are_those_of_cross_entropy(tokens: int, vocabulary: int) -> None:
    x, weight, targets = problem(tokens, hidden=2 if vocabulary > 11 else 6, vocabulary=vocabulary)
    ours = linear_cross_entropy(x, weight, targets)
    (gradient,) = torch.autograd.grad(ours, x)
    theirs = cross_entropy((x @ weight.T).float(), targets, reduction="sum")
    (expected,) = torch.autograd.grad(theirs, x)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    each = token_losses(x, weight, targets)
    # C++ sums in fp64; PyTorch's sum of a million in fp32 is further from the exact value than the tolerance.
    in_cpp = backend(x.device) is cpu
    logits = (x @ weight.T).double() if in_cpp else (x @ weight.T).float()
    torch.testing.assert_close(each, cross_entropy(logits, targets, reduction="none").float())
    assert not each.requires_grad


def test_gradient_is_right_in_float64() -> None:
    x, weight, targets = problem(4, dtype=torch.float64)
    (ours,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), x)
    (exact,) = torch.autograd.grad(cross_entropy(x @ weight.T, targets, reduction="sum"), x)
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)  # the probabilities are fp32 by definition


def test_no_rows_lose_nothing() -> None:
    x, weight, targets = problem(0)
    loss = linear_cross_entropy(x, weight, targets)
    loss.backward()
    assert loss.item() == 0 and loss.dtype == torch.float32
    assert x.grad.shape == (0, 6)
    assert token_losses(x, weight, targets).shape == (0,)


def test_in_bfloat16_the_loss_is_fp32_and_a_mean_does_not_shorten_the_gradient() -> None:
    x, weight, targets = problem(300, hidden=64, vocabulary=50, dtype=torch.bfloat16)
    loss = linear_cross_entropy(x, weight, targets)
    assert loss.dtype == torch.float32
    (summed,) = torch.autograd.grad(loss, x, retain_graph=True)
    (mean,) = torch.autograd.grad(loss / 300, x)  # 1 / 300 is 0.2% off in bf16
    assert mean.dtype == torch.bfloat16
    ratio = (mean.double() * summed.double()).sum() / (summed.double() ** 2).sum() * 300
    assert abs(ratio.item() - 1) < 2e-4


def test_large_logits_do_not_overflow() -> None:
    x, weight, targets = problem(5)
    loss = linear_cross_entropy(1e4 * x, weight, targets)
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_a_hidden_state_without_gradient_costs_none() -> None:
    x, weight, targets = problem(5)
    assert not linear_cross_entropy(x.detach(), weight, targets).requires_grad


def test_the_gradient_is_scaled_by_what_comes_from_above() -> None:
    x, weight, targets = problem(5)
    (once,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), x)
    (thrice,) = torch.autograd.grad(-3 * linear_cross_entropy(x, weight, targets), x)
    torch.testing.assert_close(thrice, -3 * once)


@pytest.mark.parametrize("count", [4, 6])
def test_a_wrong_number_of_targets_is_refused(count: int) -> None:
    x, weight, _ = problem(5)
    with pytest.raises(ShapeError, match=rf"targets must be \(5,\).* got \({count},\)"):
        linear_cross_entropy(x, weight, torch.zeros(count, dtype=torch.int64))
