"""Lion against its formula in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_within, unit
from torch import Tensor, nn

from lorakit.errors import TrainingError
from lorakit.training.optimizers import Lion

SIZE = 50


def by_definition(p: Tensor, m: Tensor, g: Tensor, lr: float, betas: tuple[float, float], decay: float) -> Tensor:
    """Program 1 of arXiv:2302.06675, in fp64; updates m in place, returns the new parameter."""
    interpolated = betas[0] * m + (1 - betas[0]) * g
    m.copy_(betas[1] * m + (1 - betas[1]) * g)
    return p - lr * (interpolated.sign() + decay * p)


@given(seed=st.integers(0, 2**31), betas=st.sampled_from([(0.9, 0.99), (0.95, 0.98), (0.0, 0.0)]))
@settings(deadline=None, max_examples=30)
def test_steps_are_those_of_the_formula(seed: int, betas: tuple[float, float]) -> None:
    random = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(SIZE, generator=random))
    optimizer = Lion([p], lr=1e-2, betas=betas, weight_decay=0.1)
    expected, momentum = p.detach().double(), torch.zeros(SIZE, dtype=torch.float64)
    for _ in range(5):
        p.grad = torch.randn(SIZE, generator=random) * (torch.rand(SIZE, generator=random) < 0.8)
        optimizer.step()
        expected = by_definition(expected, momentum, p.grad.double(), 1e-2, betas, 0.1)
    # Five steps of four roundings, of a parameter that moved by at most lr a step, and of gradients below six.
    assert_within(p, expected, 5 * 4 * unit(torch.float32) * (expected.abs() + 5 * 1e-2))
    assert_within(optimizer.state[p]["exp_avg"], momentum, 5 * 4 * unit(torch.float32) * torch.tensor(6.0))


def test_a_bf16_parameter_has_an_fp32_momentum_and_rounds_once() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(SIZE, dtype=torch.bfloat16), torch.randn(SIZE, dtype=torch.bfloat16)
    p = nn.Parameter(start.clone())
    p.grad = gradient.clone()
    (optimizer := Lion([p], lr=0.125, weight_decay=0.5)).step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    wide = start.float() * (1 - 0.125 * 0.5) - 0.125 * gradient.float().sign()
    assert torch.equal(p.detach(), wide.bfloat16())


def test_without_gradient_nothing_moves() -> None:
    idle, still = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    still.grad = torch.zeros(3)
    optimizer = Lion([idle, still])
    assert optimizer.step(lambda: 1.5) == 1.5
    assert torch.equal(idle, torch.ones(3)) and torch.equal(still, torch.ones(3))
    assert idle not in optimizer.state


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}])
def test_values_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(TrainingError, match="Lion needs"):
        Lion([nn.Parameter(torch.ones(2))], **wrong)
