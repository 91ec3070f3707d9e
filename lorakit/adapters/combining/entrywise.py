"""Matrices defined entry by entry, as TIES and DARE define theirs: never whole in memory, one block of rows at a time.

Masking the entries of an update of low rank gives a matrix of full rank, which no adapter can hold. So it is made anew
for every pass over it, from the factors it comes from, and `project` finds a near update of the rank wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..low_rank import LowRank

BLOCK_ENTRIES = 1 << 22  # 16 MiB of float32
_OVERSAMPLING = 8  # directions beyond the rank wanted, in each block of the Krylov space
_MOST_PASSES = 16
_SETTLED = 1e-3  # a pass that took less than this share off the squared error was the last


@dataclass(frozen=True)
class RowBlocks:
    """A matrix of `shape` whose rows [start, stop) are `rows(start, stop)`, the same each time the same are asked for.

    Iterating yields its blocks from the top, each of at most `entries` numbers but of one row at least.
    """

    shape: tuple[int, int]
    rows: Callable[[int, int], Tensor]
    entries: int = BLOCK_ENTRIES

    def __iter__(self) -> Iterator[Tensor]:
        height = max(1, self.entries // self.shape[1])
        for start in range(0, self.shape[0], height):
            yield self.rows(start, min(start + height, self.shape[0]))

    def kept_if_small(self) -> RowBlocks:
        """Return the same matrix, made once and kept if it is one block: as much memory, and no second making."""
        if self.shape[0] * self.shape[1] > self.entries:
            return self
        whole = self.rows(0, self.shape[0])
        return RowBlocks(self.shape, lambda start, stop: whole[start:stop], self.entries)


def kth_magnitude(matrix: RowBlocks, k: int) -> float:
    """Return the k-th largest absolute value of a float32 or float64 matrix, k from 1, exactly.

    The bits of non-negative floats stand in the order of the floats. So this is a search for an integer, its highest
    digits first: each pass counts the next 16 bits of those entries that begin as the answer does.
    """
    matrix = matrix.kept_if_small()
    dtype = next(iter(matrix)).dtype
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    begin, left = 0, k
    for shift in range(8 * dtype.itemsize - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for block in matrix:
            keys = block.abs().flatten().view(integer)
            keys = keys[keys >> shift >> 16 == begin]
            counts += torch.bincount(keys >> shift & 0xFFFF, minlength=1 << 16).cpu()
        not_less = counts.flip(0).cumsum(0).flip(0)  # digit -> entries with this digit or a higher one
        digit = int((not_less >= left).sum()) - 1
        left -= int(not_less[digit] - counts[digit])
        begin = begin << 16 | digit
    return torch.tensor(begin, dtype=integer).view(dtype).item()


@dataclass(frozen=True)
class Projection:
    """An update near a matrix.

    Attributes:
        update: of at most the rank wanted, in the matrix's dtype.
        norm, error: Frobenius norms of the matrix and of matrix - update, the latter of the difference itself.
    """

    update: LowRank
    norm: float
    error: float


def project(matrix: RowBlocks, rank: int) -> Projection:
    """Return an update of at most `rank` near a matrix, with its true distance, in a few passes over the blocks.

    It is the best one whose rows lie in a space found by block Krylov iteration on matrixᵀ matrix (Musco and Musco
    2015, arXiv:1504.05477, algorithm 2), always from the same start. Every pass tells how much of the matrix `rank`
    directions of that space can hold; the pass that gained less than a thousandth of what is missing is the last. The
    distance stated is exact. That no update is nearer by more than about that thousandth, or by rounding (in float32,
    3e-4 of the norm), is what tests find, not a proof.

    Memory: a block of rows and its masks, and up to (rows + 2 columns, passes * (rank + 8)) numbers.
    """
    matrix = matrix.kept_if_small()
    space = _row_space(matrix, rank)
    parts, squared_norm, outside = [], 0.0, 0.0
    for block in matrix:
        parts.append(block @ space)
        squared_norm += _squared(block)
        outside += _squared(block - parts[-1] @ space.T)
    inside = LowRank(torch.cat(parts), space.T)
    squared_error = outside + _squared(inside.svd[1][rank:])  # the two parts are orthogonal to each other
    return Projection(inside.truncated(rank), squared_norm**0.5, squared_error**0.5)


def _row_space(matrix: RowBlocks, rank: int) -> Tensor:
    """Return (columns, k), orthonormal: a space that nearly holds the `rank` leading right singular vectors."""
    like, columns = matrix.rows(0, 1), matrix.shape[1]
    start = torch.randn(columns, min(columns, rank + _OVERSAMPLING), generator=torch.Generator().manual_seed(0))
    basis: Tensor = torch.linalg.qr(start.to(like))[0]
    fresh = basis
    images = fresh[:, :0]  # matrixᵀ matrix @ basis
    held = float("-inf")
    for _ in range(_MOST_PASSES):
        image, squared_norm = _gram_product(matrix, fresh)
        images = torch.cat([images, image], dim=1)
        small = basis.T @ images
        energies = torch.linalg.eigvalsh((small + small.T) / 2)  # Rayleigh-Ritz, in rising order
        holds = float(energies[-rank:].sum())
        rounding = torch.finfo(like.dtype).eps * squared_norm
        if holds - held <= max(_SETTLED * (squared_norm - holds), rounding):
            break
        held = holds
        fresh = _beyond(basis, image)
        if not fresh.shape[1]:  # the space is closed under the matrix: nothing is missing
            break
        basis = torch.cat([basis, fresh], dim=1)
    return basis


def _gram_product(matrix: RowBlocks, factor: Tensor) -> tuple[Tensor, float]:
    """Return matrixᵀ matrix @ factor and the squared norm of the matrix, in one pass."""
    product, squared_norm = torch.zeros_like(factor), 0.0
    for block in matrix:
        product += block.T @ (block @ factor)
        squared_norm += _squared(block)
    return product, squared_norm


def _beyond(basis: Tensor, block: Tensor) -> Tensor:
    """Return an orthonormal basis of what `block` spans beyond `basis`: as many columns as are not rounding noise."""
    rest = block - basis @ (basis.T @ block)
    vectors, sizes, _ = torch.linalg.svd(rest, full_matrices=False)
    noise = torch.finfo(block.dtype).eps * torch.linalg.matrix_norm(block)
    vectors = vectors[:, sizes > noise][:, : len(basis) - basis.shape[1]]
    fresh: Tensor = vectors
    for _ in range(2):  # once leaves rounding noise that the next pass would enlarge
        fresh = torch.linalg.qr(fresh - basis @ (basis.T @ fresh))[0]
    return fresh


def _squared(block: Tensor) -> float:
    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
