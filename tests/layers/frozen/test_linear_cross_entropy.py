"""The fused head and loss against torch's cross-entropy over the whole logits: values, gradients, chunk boundaries."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_within, matmul_rounding, rounding
from torch import Tensor
from torch.nn.functional import cross_entropy

from lorakit.errors import ShapeError
from lorakit.layers import linear_cross_entropy, token_losses
from lorakit.sums import LONGEST_SUM, SLICE

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
@pytest.mark.parametrize("signs", ["both", "one"])
def test_value_and_gradient_are_those_of_cross_entropy(tokens: int, vocabulary: int, signs: str) -> None:
    x, weight, targets = problem(tokens, hidden=2 if vocabulary > 11 else 6, vocabulary=vocabulary)
    if signs == "one":  # summands that do not cancel: nothing hides what a long sum loses
        weight.abs_()
    ours = linear_cross_entropy(x, weight, targets)
    (gradient,) = torch.autograd.grad(ours, x)
    wide = x.detach().double().requires_grad_()
    logits = wide @ weight.double().T
    losses = cross_entropy(logits, targets, reduction="none")
    (expected,) = torch.autograd.grad(losses.sum(), wide)

    of_logits = matmul_rounding(x, weight.T)
    # A logit that is off moves the loss by at most twice as much. The sum of exponentials and its logarithm follow, of
    # which `Sum` and `Tensor.sum` lose a few units, and each exponential is right to two.
    of_loss = 2 * of_logits.amax(1) + rounding(8, 1.0) + rounding(4, logits.abs().amax(1) + losses)
    assert_within(token_losses(x, weight, targets), losses, of_loss)
    assert not token_losses(x, weight, targets).requires_grad
    assert_within(ours, losses.sum(), of_loss.sum() + rounding(1, losses.sum()))

    # A probability moves by at most twice the error of the logits, as a share; then it is one of the summands.
    probabilities = torch.softmax(logits, dim=-1)
    magnitudes = probabilities @ weight.double().abs() + weight[targets].double().abs()
    share = 2 * of_logits.amax(1, keepdim=True) + rounding(16, 1.0)
    terms = 2 + (vocabulary if vocabulary <= LONGEST_SUM else SLICE + vocabulary // SLICE)
    assert_within(gradient, expected, share * magnitudes + rounding(terms, magnitudes))


def test_gradient_is_right_in_float64() -> None:
    x, weight, targets = problem(4, dtype=torch.float64)
    (ours,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), x)
    (exact,) = torch.autograd.grad(cross_entropy(x @ weight.T, targets, reduction="sum"), x)
    # The logits become fp32 before their exponentials, by definition; the probabilities follow in fp32.
    logits = float((x @ weight.T).abs().max())
    magnitudes = torch.softmax(x @ weight.T, dim=-1) @ weight.abs() + weight[targets].abs()
    assert_within(ours, exact, rounding(1, 2 * logits) * magnitudes + rounding(16, magnitudes))


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
    assert torch.equal(thrice, -3 * once)


@pytest.mark.parametrize("count", [4, 6])
def test_a_wrong_number_of_targets_is_refused(count: int) -> None:
    x, weight, _ = problem(5)
    with pytest.raises(ShapeError, match=rf"targets must be \(5,\).* got \({count},\)"):
        linear_cross_entropy(x, weight, torch.zeros(count, dtype=torch.int64))
