"""Exact algebra on low-rank updates in O((out + in) r²): the (out, in) matrix itself is never formed.

With the QR decompositions up = Qu Ru and downᵀ = Qd Rd the update is Qu (Ru Rdᵀ) Qdᵀ. Both Q have orthonormal columns,
so the small matrix between them has the update's norms, products and singular values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import ShapeError


@dataclass(frozen=True)
class LowRank:
    """The matrix up @ down, a LoRA update with its scaling already in one of its factors.

    Shapes:
        up (out, r); down (r, in); both of one dtype on one device. Use float64 where digits count: the error of a
        singular value is about the dtype's epsilon times the largest one. r may be 0 (the zero matrix) and may exceed
        out or in.

    Raises:
        ShapeError: the factors do not fit each other.
    """

    up: Tensor
    down: Tensor

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            raise ShapeError(
                f"up {tuple(self.up.shape)} and down {tuple(self.down.shape)} do not multiply: "
                "expected (out, r) and (r, in)"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the update."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """The number r of columns of `up`, an upper bound of the update's true rank."""
        return self.up.shape[1]

    @cached_property
    def _reduced(self) -> tuple[Tensor, Tensor, Tensor]:
        left, upper = torch.linalg.qr(self.up)
        right, lower = torch.linalg.qr(self.down.T)
        return left, upper @ lower.T, right  # update = left @ core @ right.T

    @cached_property
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular vectors and values: U (out, k), S (k,) in falling order, Vh (k, in), with k = min(r, out, in)."""
        left, core, right = self._reduced
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        return left @ u, s, vh @ right.T

    @cached_property
    def singular_values(self) -> Tensor:
        """S of `svd`, (k,), in falling order; it takes a fraction of the time of `svd`."""
        upper, lower = self.triangles
        values: Tensor = torch.linalg.svdvals(upper @ lower.T)
        return values

    @cached_property
    def triangles(self) -> tuple[Tensor, Tensor]:
        """Ru and Rd, (k, r) each, up to the signs of rows; columns have the norms and products of the factors'."""
        return _triangle(self.up), _triangle(self.down.T)

    def norm(self) -> Tensor:
        """Frobenius norm, a scalar tensor."""
        norm: Tensor = self.singular_values.norm()
        return norm

    def dot(self, other: LowRank) -> Tensor:
        """Inner product, a scalar, of two updates of one shape, sum(self * other): trace((up'ᵀ up) (down down'ᵀ))."""
        self._check(other)
        return ((other.up.T @ self.up) * (other.down @ self.down.T)).sum()

    @property
    def T(self) -> LowRank:
        """The transpose, (in, out)."""
        return LowRank(self.down.T, self.up.T)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> LowRank:
        """Return the update with its factors in a dtype and on a device; itself if they are there already."""
        up, down = self.up.to(device, dtype), self.down.to(device, dtype)
        return self if up is self.up and down is self.down else LowRank(up, down)

    def scaled(self, factor: float) -> LowRank:
        """Return factor * self."""
        return LowRank(self.up * factor, self.down)

    def __add__(self, other: LowRank) -> LowRank:
        """Return the exact sum, of rank r + r'."""
        self._check(other)
        return LowRank(torch.cat([self.up, other.up], dim=1), torch.cat([self.down, other.down], dim=0))

    def __sub__(self, other: LowRank) -> LowRank:
        return self + other.scaled(-1.0)

    def truncated(self, rank: int) -> LowRank:
        """Return the nearest update of at most `rank` (Eckart-Young); each factor gets the singular values' root."""
        u, s, vh = self.svd
        root = s[:rank].sqrt()
        return LowRank(u[:, :rank] * root, root[:, None] * vh[:rank])

    def dense(self) -> Tensor:
        """Return the (out, in) matrix: for tests and small layers."""
        return self.up @ self.down

    def _check(self, other: LowRank) -> None:
        if self.shape != other.shape:
            raise ShapeError(f"updates of shapes {self.shape} and {other.shape} cannot be combined")


def added(updates: Iterable[LowRank]) -> LowRank:
    """Return the exact sum of one or more updates; its rank is the sum of theirs."""
    ups, downs = zip(*((update.up, update.down) for update in updates), strict=True)
    return LowRank(torch.cat(ups, dim=1), torch.cat(downs, dim=0))


def _triangle(matrix: Tensor) -> Tensor:
    """Return R, (k, r), of the QR decomposition of an (n, r) matrix.

    Cholesky of matrixᵀ matrix gives it in a third of the time. Its error is epsilon times the condition number, so it
    is used up to a condition number of 700 (in float64, 2e-13 of the largest singular value).
    """
    if matrix.dtype == torch.float64 and matrix.shape[0] >= matrix.shape[1]:
        upper, failed = torch.linalg.cholesky_ex(matrix.T @ matrix, upper=True)
        if not failed:
            identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
            inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
            if float(upper.norm() * inverse.norm()) <= 700:  # False for nan
                quick: Tensor = upper
                return quick
    exact: Tensor = torch.linalg.qr(matrix, mode="r").R
    return exact
