"""AdamW is torch's, and a training step needs no compiler."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from tolerances import assert_within, unit
from torch import nn

from lorakit.errors import TrainingError
from lorakit.training.optimizers import AdamW

SHAPES = [(3,), (16, 70), (), (0, 4)]


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in SHAPES]


@pytest.mark.parametrize("hyper", [{}, {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.5}])
def test_steps_are_those_of_torch(hyper: dict[str, Any]) -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizers = AdamW(ours, **hyper), torch.optim.AdamW(theirs, **hyper)
    for step in range(20):
        torch.manual_seed(step)
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape) if step % 3 or mine.dim() else None  # one is not always trained
            other.grad = None if mine.grad is None else mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        # A step rounds the parameter three times and the update, at most lr·(1 - beta1) / sqrt(1 - beta2) where one
        # gradient is all there was, some sixteen times. Both optimizers do, in twenty steps.
        lr, (beta1, beta2) = optimizers[0].defaults["lr"], optimizers[0].defaults["betas"]
        largest = lr * max(1.0, (1 - beta1) / math.sqrt(1 - beta2))
        assert_within(mine, other, 2 * 20 * unit(torch.float32) * (3 * (other.abs() + 20 * largest) + 16 * largest))


def test_parameters_in_16_bits_have_fp32_moments() -> None:
    narrow, wide = parameters(torch.bfloat16), [nn.Parameter(p.detach().float()) for p in parameters(torch.bfloat16)]
    optimizers = AdamW(narrow, lr=0.01), AdamW(wide, lr=0.01)
    for group in (narrow, wide):
        for parameter in group:
            parameter.grad = torch.full_like(parameter, 0.25)
    for optimizer in optimizers:
        optimizer.step()
    for ours, exact in zip(narrow, wide, strict=True):
        assert optimizers[0].state[ours]["exp_avg_sq"].dtype == torch.float32
        assert_within(ours, exact, 1.01 * unit(torch.bfloat16) * exact.abs())  # one rounding, of a number near this


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}, {"weight_decay": -0.1}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="AdamW needs lr >= 0"):
        AdamW(parameters(torch.float32), **wrong)


STEP = """
import sys, torch
from lorakit import TrainConfig
from lorakit.models.decoder.recompute import recomputed
from lorakit.training.optimizers.build import build_optimizer
for name in ("adamw", "adamw_8bit", "lion"):
    layer = torch.nn.Linear(80, 80)
    optimizer = build_optimizer(dict(layer.named_parameters()), TrainConfig(optimizer=name))
    recomputed(layer, layer, torch.randn(3, 80)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
"""


def test_a_step_does_not_import_the_compiler() -> None:
    run = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
