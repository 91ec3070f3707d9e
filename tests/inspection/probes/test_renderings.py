"""Probes and examples of several renderings: losses belong to the conversation, activations to one sequence."""

from __future__ import annotations

import torch

from lorakit.data import Example, make_batch
from lorakit.inspection.probes.drift import probe_rows
from lorakit.inspection.probes.token_losses import TokenLosses

TWO = Example([1, 2, 3, 1, 2, 4, 5], [False, False, True, False, False, True, True], "a:1", (3, 4))
ONE = Example([6, 7, 8, 9], [False, True, True, True], "a:2")


def test_losses_are_of_the_conversation_and_positions_of_the_sequence() -> None:
    losses = TokenLosses()
    batch = make_batch([TWO, ONE])
    losses.add([TWO, ONE], batch, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert batch.lengths == [3, 4, 4]
    assert losses.examples == [("a:1", 2.0, 3), ("a:2", 5.0, 3)]
    assert (losses.sums, losses.counts) == ([1.0 + 2.0 + 4.0, 3.0 + 5.0 + 6.0], [3, 3])  # positions 0, and 1-2


def test_activations_are_compared_within_the_first_sequence() -> None:
    assert probe_rows([TWO, ONE], 2, 10).tolist() == [[1, 2, 3], [6, 7, 8]]
