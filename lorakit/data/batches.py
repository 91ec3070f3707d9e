"""From examples to the model's input: shuffled steps, micro-batches under a token budget, padding-free batches.

A batch packs its examples end to end in one long row and keeps their lengths. Attention and positions start afresh at
each example. Without padding no computation is wasted. A step's loss is a sum over its trained tokens divided by their
number, so the cut into micro-batches changes memory and speed but never the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import ConfigError, DataError
from .encode import Example

IGNORED = -100  # the default ignore_index of torch's cross-entropy


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples laid end to end.

    The first token of a rendering is never trained, so that no rendering predicts the next.

    Attributes:
        input_ids: (tokens,) int64.
        targets: (tokens,) int64; targets[i] is the token after input_ids[i] in the same example, or -100 where that
            token is not trained or there is none.
        lengths: tokens of each rendering of each example, in order; they sum to `tokens`.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    lengths: list[int]

    @property
    def trained_tokens(self) -> int:
        """The number of targets that count in the loss."""
        return int((self.targets != IGNORED).sum())


def make_batch(examples: Sequence[Example]) -> Batch:
    """Lay examples end to end.

    Raises:
        DataError: there is no example, or none of them has a trained token: the mean loss would be 0 / 0.
    """
    if not examples:
        raise DataError("a batch needs at least one example")
    input_ids: list[int] = []
    targets: list[int] = []
    for example in examples:
        input_ids += example.input_ids
        following = zip(example.input_ids[1:], example.loss_mask[1:], strict=True)
        targets += [token if trained else IGNORED for token, trained in following]
        targets.append(IGNORED)
    batch = Batch(torch.tensor(input_ids), torch.tensor(targets), [n for example in examples for n in example.lengths])
    if batch.trained_tokens == 0:
        raise DataError(f"no token of this batch is trained ({', '.join(example.source for example in examples[:5])})")
    return batch


def batch_order(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return which examples each step of an epoch takes: a fresh shuffle per epoch, the last step possibly shorter.

    The order depends on the arguments alone, so a resumed run goes on where the first one would have.

    Raises:
        ConfigError: batch_size is under 1.
        DataError: count is under 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1 (got {batch_size})")
    if count < 1:
        raise DataError("there is no example to train on")
    # Hashed, because torch's CPU generator keeps 32 bits of its seed: any plain seed + epoch formula collides.
    digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]


def micro_batches(examples: Sequence[Example], token_budget: int) -> list[list[Example]]:
    """Group the examples of one step so that each group holds at most `token_budget` tokens (best-fit decreasing).

    The longest come first, each into the fullest group that has room for it. At worst that takes about 11/9 of the
    fewest possible groups (Johnson et al. 1974). Lengths fall within a group, so examples of equal length are
    neighbours, and attention takes them as one rectangle. An example longer than the budget gets a group of its own.

    Raises:
        ConfigError: token_budget is under 1.
    """
    if token_budget < 1:
        raise ConfigError(f"token_budget must be at least 1 (got {token_budget})")
    groups: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):  # stable: equal lengths keep order
        size = len(example.input_ids)
        fitting = min((index for index, free in enumerate(room) if size <= free), key=room.__getitem__, default=None)
        if fitting is None:
            groups.append([example])
            room.append(token_budget - size)
        else:
            groups[fitting].append(example)
            room[fitting] -= size
    return groups
