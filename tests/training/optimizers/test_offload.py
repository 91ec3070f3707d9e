"""States in host memory: the same numbers, and places that stay.

Without a GPU the copies go from host memory to host memory, through the same code.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from made import adapted
from torch import Tensor, nn

from lorakit import TrainConfig
from lorakit.training.optimizers import OPTIMIZERS, states_to_host, step_from_host
from lorakit.training.optimizers.base import Optimizer
from lorakit.training.optimizers.build import build_optimizer, set_learning_rate

KINDS = tuple(OPTIMIZERS)


def built(**settings: Any) -> tuple[dict[str, nn.Parameter], Optimizer]:
    model = adapted(r=128)  # some tensors have 8-bit moments, some are too small for them
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return parameters, build_optimizer(parameters, TrainConfig(weight_decay=0.1, loraplus_lr_ratio=4, **settings))


def give_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    for number, p in enumerate(parameters.values()):
        random = torch.Generator().manual_seed(1000 * step + number)
        p.grad = None if (step + number) % 5 == 0 else torch.randn(p.shape, generator=random)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_from_states_that_stay_where_they_are(kind: str) -> None:
    (ours, offloaded), (theirs, plain) = built(optimizer=kind), built(optimizer=kind)
    places: dict[tuple[str, str], int] = {}
    for step in range(6):
        for parameters, optimizer in ((ours, offloaded), (theirs, plain)):
            give_gradients(parameters, step)
            set_learning_rate(optimizer, 1e-3 * (step + 1))
        step_from_host(offloaded)
        plain.step()
        for name, p in ours.items():
            assert torch.equal(p, theirs[name])
            other: dict[str, Tensor] = plain.state[theirs[name]]
            assert set(offloaded.state[p]) == set(other)
            for key, value in offloaded.state[p].items():
                assert torch.equal(value, other[key]) and value.dtype == other[key].dtype
                assert places.setdefault((name, key), value.data_ptr()) == value.data_ptr()
    assert {key for name, key in places if "lora_A" in name} == set(
        plain.state_bytes(next(iter(theirs.values())).numel())
    )
    assert len(offloaded.param_groups) == 2  # as before the step


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_sees_copies_of_one_parameters_states(kind: str) -> None:
    """What would be on the GPU: never two parameters' states at once."""
    parameters, optimizer = built(optimizer=kind)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    step_from_host(optimizer)
    home = {value.data_ptr() for state in optimizer.state.values() for value in state.values()}
    seen = []

    def look(of: torch.optim.Optimizer, *_: object) -> None:
        (group,) = of.param_groups
        visiting = {p for p, state in of.state.items() if any(t.data_ptr() not in home for t in state.values())}
        assert visiting == set(group["params"])
        seen.extend(visiting)

    optimizer.register_step_pre_hook(look)
    step_from_host(optimizer)
    assert set(seen) == set(parameters.values()) and len(seen) == len(parameters)


def test_an_error_leaves_the_groups_as_they_were() -> None:
    parameters, optimizer = built(optimizer="adamw_8bit")
    give_gradients(parameters, 1)
    groups = optimizer.param_groups
    groups[0]["betas"] = None
    with pytest.raises(TypeError):
        step_from_host(optimizer)
    assert optimizer.param_groups is groups


def test_states_that_are_on_the_host_stay() -> None:
    parameters, optimizer = built(optimizer="adamw")
    give_gradients(parameters, 1)
    optimizer.step()
    before = {p: dict(state) for p, state in optimizer.state.items()}
    states_to_host(optimizer)
    assert all(optimizer.state[p][key] is value for p, state in before.items() for key, value in state.items())
