"""Matrices defined entry by entry, as by TIES and DARE, with one block of rows in memory at a time.

Masking the entries of a low-rank update gives a matrix of full rank, which no adapter can hold. So every pass over it
computes its blocks again from the update's factors, and `project` finds a near update of the wanted rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..low_rank import LowRank

BLOCK_ENTRIES = 1 << 22  # 16 MiB of float32
_OVERSAMPLING = 8  # directions beyond the wanted rank, in each block of the Krylov space
_MOST_PASSES = 16
_SETTLED = 1e-3  # iteration ends with a pass that reduced the squared error by less than this share


@dataclass(frozen=True)
class RowBlocks:
    """A matrix of `shape` whose rows [start, stop) are `rows(start, stop)`, the same at every call.

    Iterating yields its blocks from the top, each with at most `entries` numbers and at least one row.
    """

    shape: tuple[int, int]
    rows: Callable[[int, int], Tensor]
    entries: int = BLOCK_ENTRIES

    def __iter__(self) -> Iterator[Tensor]:
        height = max(1, self.entries // self.shape[1])
        for start in range(0, self.shape[0], height):
            yield self.rows(start, min(start + height, self.shape[0]))

    def kept_if_small(self) -> RowBlocks:
        """Return the same matrix; if it is a single block, it is computed once and kept, as it needs no more memory."""
        if self.shape[0] * self.shape[1] > self.entries:
            return self
        matrix = self.rows(0, self.shape[0])
        return RowBlocks(self.shape, lambda start, stop: matrix[start:stop], self.entries)


def kth_magnitude(matrix: RowBlocks, k: int) -> float:
    """Return the k-th largest absolute value of a float32 or float64 matrix, k from 1, exactly.

    Non-negative floats have the same order as their bits read as integers. So this searches for an integer from its
    highest digits on: each pass counts the next 16 bits of the entries whose higher bits are the answer's.
    """
    matrix = matrix.kept_if_small()
    dtype = next(iter(matrix)).dtype
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    prefix, left = 0, k
    for shift in range(8 * dtype.itemsize - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for block in matrix:
            keys = block.abs().flatten().view(integer)
            keys = keys[keys >> shift >> 16 == prefix]
            counts += torch.bincount(keys >> shift & 0xFFFF, minlength=1 << 16).cpu()
        not_less = counts.flip(0).cumsum(0).flip(0)  # digit -> entries with this digit or a higher one
        digit = int((not_less >= left).sum()) - 1
        left -= int(not_less[digit] - counts[digit])
        prefix = prefix << 16 | digit
    return torch.tensor(prefix, dtype=integer).view(dtype).item()


@dataclass(frozen=True)
class Projection:
    """An update near a matrix.

    Attributes:
        update: of at most the wanted rank, in the matrix's dtype.
        norm: Frobenius norm of the matrix.
        error: Frobenius norm of matrix - update, computed from the difference itself.
    """

    update: LowRank
    norm: float
    error: float


def project(matrix: RowBlocks, rank: int) -> Projection:
    """Return an update of at most `rank` near a matrix, with its exact distance, in a few passes over the blocks.

    It is the best update whose rows lie in a certain space. Block Krylov iteration on matrixᵀ matrix finds that space
    (Musco and Musco 2015, arXiv:1504.05477, algorithm 2), always from the same start. Every pass tells how much of the
    matrix `rank` directions of the space can hold. The iteration ends with a pass that gains less than a thousandth of
    the squared error. In tests no update is nearer by more than about that thousandth, or by rounding (in float32, 3e-4
    of the norm); this is not proven.

    Memory: a block of rows and its masks, and up to (rows + 2 columns, passes * (rank + 8)) numbers.
    """
    matrix = matrix.kept_if_small()
    space = _row_space(matrix, rank)
    coordinates, squared_norm, outside = [], 0.0, 0.0
    for block in matrix:
        coordinates.append(block @ space)
        squared_norm += _squared(block)
        outside += _squared(block - coordinates[-1] @ space.T)
    inside = LowRank(torch.cat(coordinates), space.T)
    squared_error = outside + _squared(inside.svd[1][rank:])  # the two differences are orthogonal to each other
    return Projection(inside.truncated(rank), squared_norm**0.5, squared_error**0.5)


def _row_space(matrix: RowBlocks, rank: int) -> Tensor:
    """Return an orthonormal basis, (columns, k), of a space near the `rank` leading right singular vectors."""
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
        if not fresh.shape[1]:  # the space is closed under matrixᵀ matrix: nothing is missing
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
    """Return an orthonormal basis of the span of `block` beyond `basis`, without directions that are rounding noise."""
    rest = block - basis @ (basis.T @ block)
    vectors, sizes, _ = torch.linalg.svd(rest, full_matrices=False)
    noise = torch.finfo(block.dtype).eps * torch.linalg.matrix_norm(block)
    vectors = vectors[:, sizes > noise][:, : len(basis) - basis.shape[1]]
    fresh: Tensor = vectors
    for _ in range(2):  # once would leave rounding noise, which the next pass would amplify
        fresh = torch.linalg.qr(fresh - basis @ (basis.T @ fresh))[0]
    return fresh


def _squared(block: Tensor) -> float:
    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
