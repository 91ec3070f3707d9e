"""Batches: what is predicted from what, shuffles that can be repeated, micro-batches that do not change the loss."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_within, rounding
from torch.nn import functional

from lorakit.data import Batch, Example, batch_order, make_batch, micro_batches
from lorakit.errors import ConfigError, DataError

VOCABULARY = 20


@st.composite
def examples(draw: st.DrawFn, max_length: int = 30) -> Example:
    ids = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=max_length))
    mask = draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1).filter(any))
    return Example(ids, [False, *mask], f"t.jsonl:{draw(st.integers(1, 10**6))}")


STEPS = st.lists(examples(), min_size=1, max_size=12)


def test_targets_are_the_next_trained_tokens_of_the_same_example() -> None:
    batch = make_batch([Example([1, 2, 3], [False, False, True], "a"), Example([4, 5], [False, True], "b")])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert batch.targets.tolist() == [-100, 3, -100, 5, -100]
    assert batch.lengths == [3, 2]
    assert batch.trained_tokens == 2
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64


def test_batch_without_trained_token_is_refused() -> None:
    with pytest.raises(DataError, match=r"no token of this batch is trained \(a\)"):
        make_batch([Example([1, 2], [False, False], "a")])
    with pytest.raises(DataError, match="at least one example"):
        make_batch([])


@given(STEPS)
def test_batch_holds_exactly_the_examples(step: list[Example]) -> None:
    batch = make_batch(step)
    assert batch.trained_tokens == sum(sum(example.loss_mask) for example in step)
    inputs, targets = batch.input_ids.split(batch.lengths), batch.targets.split(batch.lengths)
    for example, ids, wanted in zip(step, inputs, targets, strict=True):
        assert ids.tolist() == example.input_ids
        assert [target != -100 for target in wanted.tolist()] == [*example.loss_mask[1:], False]
        assert all(
            target in (-100, token) for target, token in zip(wanted.tolist(), example.input_ids[1:], strict=False)
        )


@given(st.integers(1, 200), st.integers(1, 50), st.integers(-(2**63), 2**63), st.integers(0, 10**6))
def test_every_epoch_takes_each_example_once(count: int, batch_size: int, seed: int, epoch: int) -> None:
    steps = batch_order(count, batch_size, seed, epoch)
    assert sorted(index for step in steps for index in step) == list(range(count))
    assert [len(step) for step in steps[:-1]] == [batch_size] * (len(steps) - 1)
    assert 1 <= len(steps[-1]) <= batch_size
    assert steps == batch_order(count, batch_size, seed, epoch)


def test_epochs_and_seeds_differ() -> None:
    orders = {str(batch_order(50, 8, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_order_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batch_order(10, 2, seed=0, epoch=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        batch_order(10, 0, 0, 0)
    with pytest.raises(DataError, match="no example"):
        batch_order(0, 4, 0, 0)
    with pytest.raises(ConfigError, match="token_budget"):
        micro_batches([], 0)


@given(STEPS, st.integers(1, 60))
def test_micro_batches_keep_every_example_and_the_budget(step: list[Example], budget: int) -> None:
    groups = micro_batches(step, budget)
    assert sorted(map(id, step)) == sorted(id(example) for group in groups for example in group)
    sizes = [sum(len(example.input_ids) for example in group) for group in groups]
    assert all(size <= budget or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    assert all(first + second > budget for first, second in combinations(sizes, 2))  # none could be joined
    assert all(len(a.input_ids) >= len(b.input_ids) for group in groups for a, b in pairwise(group))
    assert groups == micro_batches(step, budget)


def test_best_fit_decreasing() -> None:
    step = [Example([0] * size, [False] * size, str(size)) for size in (3, 5, 12, 6, 4, 1, 2)]
    grouped = [[len(example.input_ids) for example in group] for group in micro_batches(step, 10)]
    assert grouped == [[12], [6, 4], [5, 3, 2], [1]]


def test_the_fullest_group_with_room_is_taken() -> None:
    """The first with room would leave a token beside 16 and 3, another beside 12, 5 and 2, and need a third group."""
    step = [Example([0] * size, [False] * size, str(size)) for size in (16, 12, 5, 3, 2, 2)]
    grouped = [[len(example.input_ids) for example in group] for group in micro_batches(step, 20)]
    assert grouped == [[16, 2, 2], [12, 5, 3]]


@given(STEPS, st.integers(1, 100))
@settings(deadline=None, max_examples=25)
def test_loss_does_not_depend_on_the_grouping(step: list[Example], budget: int) -> None:
    """A bigram model's summed loss and gradient, in float64: only the order of the sums may differ."""

    def loss_and_gradient(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        table = torch.sin(torch.arange(VOCABULARY**2, dtype=torch.float64)).view(VOCABULARY, VOCABULARY)
        table.requires_grad_()
        trained = sum(batch.trained_tokens for batch in batches)
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            total += functional.cross_entropy(table[batch.input_ids], batch.targets, reduction="sum") / trained
        total.backward()
        assert table.grad is not None
        return total.detach(), table.grad

    whole = loss_and_gradient([make_batch(step)])
    grouped = loss_and_gradient([make_batch(group) for group in micro_batches(step, budget)])
    terms = 2 * VOCABULARY + sum(len(example.input_ids) for example in step) + 8  # log-softmax, and all tokens
    magnitude = math.log(VOCABULARY) + 2, 2.0  # of a token's loss, and of what its gradient has at most
    for found, expected, size in zip(grouped, whole, magnitude, strict=True):
        assert_within(found, expected, 2 * rounding(terms, size, torch.float64))
