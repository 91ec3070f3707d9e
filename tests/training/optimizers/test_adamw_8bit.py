"""AdamW8bit against torch's AdamW, and its state there and back."""

from __future__ import annotations

import copy

import pytest
import torch
from small_training import update_ratio
from tolerances import assert_within, unit
from torch import Tensor, nn

from lorakit.errors import TrainingError
from lorakit.training.optimizers import SMALLEST_8BIT, AdamW8bit

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def regression(optimizer: type[torch.optim.Optimizer], size: int, steps: int = 300) -> tuple[float, float, Tensor]:
    """Fit a linear map to noisy targets; return the loss at the start, at the end, and the weight."""
    random = torch.Generator().manual_seed(0)
    x, truth = torch.randn(256, size, generator=random), torch.randn(size, size, generator=random) / size**0.5
    y = x @ truth + 0.1 * torch.randn(256, size, generator=random)
    weight = nn.Parameter(torch.zeros(size, size))
    chosen = optimizer([weight], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = (x @ weight - y).square().mean()
        chosen.zero_grad()
        loss.backward()
        chosen.step()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1], weight.detach()


def test_small_tensors_take_the_steps_of_adamw() -> None:
    size = 63  # 3,969 elements
    assert size**2 < SMALLEST_8BIT
    random = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(size, size)) for _ in range(2))
    optimizers = AdamW8bit([ours], **HYPER), torch.optim.AdamW([theirs], **HYPER)
    for _ in range(20):
        gradient = torch.randn(size, size, generator=random)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    # As in test_adamw.py: a step rounds the parameter three times, and the update some sixteen times; with these betas
    # an update is at most the learning rate.
    assert_within(ours, theirs, 2 * 20 * unit(torch.float32) * (3 * (theirs.abs() + 20 * 1e-2) + 16 * 1e-2))


def test_eight_bits_converge_as_adamw_does() -> None:
    start, ours, weight = regression(AdamW8bit, 80)
    _, theirs, other = regression(torch.optim.AdamW, 80)
    assert theirs < 0.02 * start
    assert ours < 1.05 * theirs
    assert (weight - other).norm() < 0.05 * other.norm()
    assert not torch.equal(weight, other)  # it is 8 bits that were tested


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_there_and_back(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    start = [torch.randn(70, 80).to(dtype), torch.randn(90).to(dtype)]
    ours, theirs = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    gradients = [[torch.randn_like(p) for p in start] for _ in range(6)]

    def advance(parameters: list[nn.Parameter], optimizer: AdamW8bit, some: list[list[Tensor]]) -> None:
        for step in some:
            for p, g in zip(parameters, step, strict=True):
                p.grad = g.clone()
            optimizer.step()

    first = AdamW8bit([{"params": ours[:1]}, {"params": ours[1:], "weight_decay": 0.0}], **HYPER)
    advance(ours, first, gradients[:3])
    saved = copy.deepcopy(first.state_dict())
    large, small = first.state[ours[0]], first.state[ours[1]]
    assert set(large) == set(first.state_bytes(ours[0].numel())) and set(small) == set(
        first.state_bytes(ours[1].numel())
    )
    assert large["exp_avg"].dtype == torch.uint8 and large["exp_avg_sq_absmax"].shape == (22,)
    assert small["exp_avg"].dtype == torch.float32
    second = AdamW8bit([{"params": theirs[:1]}, {"params": theirs[1:]}], lr=9.0)
    second.load_state_dict(saved)
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p)
        for key, value in first.state[p].items():
            assert torch.equal(value, second.state[q][key]) and value.dtype == second.state[q][key].dtype
            assert value.data_ptr() != second.state[q][key].data_ptr()
    advance(ours, first, gradients[3:])
    advance(theirs, second, gradients[3:])
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_no_step_is_much_larger_than_the_learning_rate() -> None:
    torch.manual_seed(0)
    scale = 1e-4 * torch.exp(2 * torch.randn(1 << 14))  # gradients of many magnitudes in one block
    parameter = nn.Parameter(torch.zeros(1 << 14))
    optimizer = AdamW8bit([parameter], lr=1e-3, weight_decay=0.0)
    for step in range(40):
        before = parameter.detach().clone()
        parameter.grad = torch.randn(1 << 14) * scale * (torch.rand(1 << 14) < (0.1 if step % 2 else 1.0))
        optimizer.step()
        assert (parameter.detach() - before).abs().max() < 3e-3


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 10, 60])
def test_updates_have_the_size_of_adamws(steps: int, sparsity: float) -> None:
    assert update_ratio(AdamW8bit, steps, sparsity) == pytest.approx(1, abs=0.03)


def test_a_parameter_without_gradient_gets_no_state() -> None:
    parameters = [nn.Parameter(torch.ones(80, 80)), nn.Parameter(torch.ones(3))]
    optimizer = AdamW8bit(parameters)
    assert optimizer.step(lambda: 2.5) == 2.5
    assert not optimizer.state
    assert all((p == 1).all() for p in parameters)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}, {"weight_decay": -0.1}])
def test_values_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(TrainingError, match="AdamW8bit needs"):
        AdamW8bit([nn.Parameter(torch.ones(2))], **wrong)
