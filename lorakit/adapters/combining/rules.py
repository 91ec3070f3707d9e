"""Rules by which the updates of one layer become one: each with its equation and paper.

`linear` keeps low rank and is exact. The others act on the entries of the updates, whatever factors they come in, and
are given as row blocks. A weight multiplies its update before anything else is done but pruning and dropping, which
do not see it: with a weight of -1 an update is subtracted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..low_rank import LowRank, added
from .entrywise import BLOCK_ENTRIES, RowBlocks, kth_magnitude

# rows(start, stop) of one update with some of its entries set to zero
RowReader = Callable[[int, int], Tensor]


def linear(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return Σ weight · update, exact, its rank the sum of theirs."""
    return added(update.scaled(weight) for update, weight in zip(updates, weights, strict=True))


def pruned(update: LowRank, density: float, entries: int = BLOCK_ENTRIES) -> RowReader:
    """Return the update with its int(density · size) entries of largest magnitude, at least one; equals stay together.

    That is "trim" of TIES (Yadav et al. 2023, arXiv:2306.01708, section 3, step 1), here within each layer.
    """
    whole = _rows(update)
    kept = max(1, int(density * update.shape[0] * update.shape[1]))
    least = kth_magnitude(RowBlocks(update.shape, whole, entries), kept)

    def rows(start: int, stop: int) -> Tensor:
        block = whole(start, stop)
        return torch.where(block.abs() >= least, block, 0)

    return rows


def dropped(update: LowRank, density: float, seed: str) -> RowReader:
    """Return the update with each entry kept with probability `density`, then divided by it: the same on average.

    DARE (Yu et al. 2023, arXiv:2311.03099, eq. 1 with p = 1 - density). What is kept is decided by `seed` and the
    first row of the block.
    """
    whole = _rows(update)

    def rows(start: int, stop: int) -> Tensor:
        block = whole(start, stop)
        digest = hashlib.blake2b(f"{seed}/{start}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        kept = torch.rand(block.shape, generator=generator).to(block.device) < density
        return torch.where(kept, block / density, 0)

    return rows


def summed(parts: Sequence[RowReader], weights: Sequence[float]) -> RowReader:
    """Return Σ weight · part."""

    def rows(start: int, stop: int) -> Tensor:
        blocks = (weight * part(start, stop) for part, weight in zip(parts, weights, strict=True))
        total = next(blocks)
        for block in blocks:
            total += block
        return total

    return rows


def elected(parts: Sequence[RowReader], weights: Sequence[float]) -> RowReader:
    """Return for each entry the mean of those weight · part that have the sign of their sum; zeros have no sign.

    "Elect" and "disjoint merge" of TIES (arXiv:2306.01708, section 3, steps 2 and 3); equal weights are its λ. Where
    the sum is zero, so is the result.
    """

    def rows(start: int, stop: int) -> Tensor:
        blocks = [weight * part(start, stop) for part, weight in zip(parts, weights, strict=True)]
        sign = sum(blocks[1:], start=blocks[0]).sign()
        total, count = torch.zeros_like(sign), torch.zeros_like(sign)
        for block in blocks:
            agrees = block * sign > 0
            total += torch.where(agrees, block, 0)
            count += agrees
        return total / count.clamp(min=1)

    return rows


def _rows(update: LowRank) -> RowReader:
    return lambda start, stop: update.up[start:stop] @ update.down
