"""Rules that combine the updates of one layer, each with its equation and paper.

`linear` keeps the rank low and is exact. The others act on the entries of the updates, whatever their factors, and read
them in blocks of rows. Updates are pruned or dropped first, without their weights; then each is multiplied by its
weight, and the rest follows. With a weight of -1 an update is subtracted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..low_rank import LowRank, added
from .entrywise import BLOCK_ENTRIES, RowBlocks, kth_magnitude

RowReader = Callable[[int, int], Tensor]  # (start, stop) -> the rows [start, stop) of a matrix


def linear(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return Σ weight · update, exactly; its rank is the sum of the ranks."""
    return added(update.scaled(weight) for update, weight in zip(updates, weights, strict=True))


def pruned(update: LowRank, density: float, entries: int = BLOCK_ENTRIES) -> RowReader:
    """Return the update with only its int(density · size) entries of largest magnitude, at least one, and their equals.

    This is "trim" of TIES (Yadav et al. 2023, arXiv:2306.01708, section 3, step 1), here within each layer.
    """
    read = _rows(update)
    kept = max(1, int(density * update.shape[0] * update.shape[1]))
    least = kth_magnitude(RowBlocks(update.shape, read, entries), kept)

    def rows(start: int, stop: int) -> Tensor:
        block = read(start, stop)
        return torch.where(block.abs() >= least, block, 0)

    return rows


def dropped(update: LowRank, density: float, seed: str) -> RowReader:
    """Return the update with each entry kept with probability `density` and divided by it, so the mean stays the same.

    DARE (Yu et al. 2023, arXiv:2311.03099, eq. 1 with p = 1 - density). `seed` and the number of the block's first row
    decide which entries are kept.
    """
    read = _rows(update)

    def rows(start: int, stop: int) -> Tensor:
        block = read(start, stop)
        digest = hashlib.blake2b(f"{seed}/{start}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        kept = torch.rand(block.shape, generator=generator).to(block.device) < density
        return torch.where(kept, block / density, 0)

    return rows


def summed(readers: Sequence[RowReader], weights: Sequence[float]) -> RowReader:
    """Return Σ weight · update."""

    def rows(start: int, stop: int) -> Tensor:
        blocks = (weight * read(start, stop) for read, weight in zip(readers, weights, strict=True))
        total = next(blocks)
        for block in blocks:
            total += block
        return total

    return rows


def elected(readers: Sequence[RowReader], weights: Sequence[float]) -> RowReader:
    """Return, entry by entry, the mean of the values weight · update with the sign of their sum; zeros have no sign.

    "Elect" and "disjoint merge" of TIES (arXiv:2306.01708, section 3, steps 2 and 3); equal weights are its λ. If the
    sum is zero, so is the result.
    """

    def rows(start: int, stop: int) -> Tensor:
        blocks = [weight * read(start, stop) for read, weight in zip(readers, weights, strict=True)]
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
