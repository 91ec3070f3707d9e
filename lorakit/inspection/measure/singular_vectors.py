"""Singular vectors of base weights: all of them for small layers, the leading ones by randomized SVD for large ones.

The randomized ones are kept in the cache folder under a hash of the weight's own bytes, so that a second adapter of the
same base finds them. A bound on their error is computed and kept with them.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lorakit_kernels.cache import cache_folder
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import StorageError
from ...files import atomic_write

EXACT_UP_TO = 1024  # rows or columns, whichever is less: 0.1 s for 576; four times the side takes 50 times as long
LEADING = 64  # most singular triplets to keep
_OVERSAMPLE = 16
_DEPTH = 5  # products with the matrix between two Rayleigh-Ritz steps
_MOST_STEPS = 4
_TOLERANCE = 1e-9  # of the largest eigenvalue
_SEED = 0


@dataclass(frozen=True)
class SingularVectors:
    """The leading part of W = U diag(S) Vᵀ, in float64.

    Attributes:
        u (out, k), s (k,) in falling order, v (in, k), with k at most LEADING.
        error: every s is within error of a singular value of W, and the sine of the angle between its u and the true
            one is at most error / gap, where gap is the distance from s to the nearest other singular value (Wedin
            1972).
        all_values, basis: for small layers all singular values (n,), and the singular vectors (n, n) of the smaller
            side; None if only the leading ones are known.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    error: float
    all_values: Tensor | None = None
    basis: Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether all singular vectors are known."""
        return self.basis is not None

    @property
    def known(self) -> Tensor:
        """Mask (n,) of the `all_values` above rounding: squaring loses those below 1e-7 of the largest."""
        assert self.all_values is not None
        return self.all_values > 1e-7 * self.all_values[0]

    def left_cosines(self, weight: Tensor, y: Tensor) -> Tensor:
        """Return |Uᵀ y| over all known left singular vectors: y (out, m) with unit columns -> (known, m)."""
        if self.basis is None or self.all_values is None:
            return (self.u.T @ y).abs()
        if weight.shape[0] <= weight.shape[1]:
            return (self.basis.T @ y)[self.known].abs()
        return ((self.basis.T @ (weight.double().T @ y)) / self.all_values[:, None])[self.known].abs()  # U = W V / S


def singular_vectors(weight: Tensor) -> SingularVectors:
    """Decompose a weight (out, in): completely up to EXACT_UP_TO, else its LEADING triplets, cached on disk."""
    if min(weight.shape) <= EXACT_UP_TO:
        return complete_vectors(weight)
    path = _cache_file(weight)
    vectors = _read_cache(path)
    if vectors is None:
        vectors = leading_vectors(weight.float(), LEADING)
        _write_cache(path, vectors)
    return vectors


def complete_vectors(weight: Tensor) -> SingularVectors:
    """Return all singular vectors of a weight (out, in): eigenvectors of the smaller of W Wᵀ and Wᵀ W, in float64."""
    matrix = weight.double()
    is_wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T if is_wide else matrix.T @ matrix)
    values, basis = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    count = min(LEADING, int((values > 1e-7 * values[0]).sum()))
    near, s = basis[:, :count], values[:count]
    far = (matrix.T @ near if is_wide else matrix @ near) / s
    u, v = (near, far) if is_wide else (far, near)
    residual = matrix @ v - u * s if is_wide else matrix.T @ u - v * s  # `far` makes the other one zero
    return SingularVectors(u, s, v, float(residual.norm(dim=0).max()) if count else 0.0, values, basis)


def leading_vectors(
    weight: Tensor, k: int, start: Tensor | None = None, change: tuple[Tensor, Tensor] | None = None
) -> SingularVectors:
    """Return k leading triplets by a randomized block Krylov method (Musco and Musco 2015, arXiv:1504.05477, alg. 2).

    Args:
        weight: (out, in); products run in its dtype.
        start: (n, k + a few), where n is the smaller side; replaces a random matrix.
        change: up (out, r) and down (r, in), added to the weight without being multiplied out.
    """
    matrix = weight if weight.shape[0] <= weight.shape[1] else weight.T
    left, right = change or (weight.new_zeros(weight.shape[0], 0), weight.new_zeros(0, weight.shape[1]))
    left, right = (left, right) if matrix is weight else (right.T, left.T)
    left, right = left.to(weight.dtype), right.to(weight.dtype)

    def times_transposed(x: Tensor) -> Tensor:
        return matrix.T @ x + right.T @ (left.T @ x)

    def times_square(x: Tensor) -> Tensor:
        y = times_transposed(x)
        return matrix @ y + left @ (right @ y)

    if start is None:
        generator = torch.Generator().manual_seed(_SEED)
        start = torch.randn(len(matrix), k + _OVERSAMPLE, generator=generator)
    _, near = leading_eigenvectors(times_square, start.to(weight.dtype), k)
    far, s, small = torch.linalg.svd(times_transposed(near), full_matrices=False)
    near = near @ small.T
    error = float((matrix @ far + left @ (right @ far) - near * s).norm(dim=0).max())
    u, v = (near, far) if matrix is weight else (far, near)
    return SingularVectors(u.double(), s.double(), v.double(), error)


def leading_eigenvectors(apply: Callable[[Tensor], Tensor], start: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k leading eigenvalues (k,), falling, and eigenvectors (n, k) of a positive (n, n) matrix.

    The method builds block Krylov spaces and restarts them.

    Args:
        apply: multiplies the matrix by (n, m).
        start: (n, at least k), the first block.
    """
    basis: Tensor = torch.linalg.qr(start).Q
    for _ in range(_MOST_STEPS):
        blocks = basis
        for _ in range(_DEPTH):
            if blocks.shape[1] + basis.shape[1] > len(start):
                break
            new = apply(blocks[:, -basis.shape[1] :])
            for _ in range(2):  # doing it once leaves rounding errors
                new = new - blocks @ (blocks.T @ new)
            blocks = torch.cat([blocks, torch.linalg.qr(new).Q], dim=1)
        product = apply(blocks)
        values, vectors = torch.linalg.eigh(blocks.T @ product)
        values, vectors = values.flip(0), vectors.flip(1)[:, : basis.shape[1]]
        basis = blocks @ vectors
        residual = (product @ vectors[:, :k] - basis[:, :k] * values[:k]).norm(dim=0).max()
        if residual <= _TOLERANCE * values[0]:
            break
    return values[:k], basis[:, :k]


def _cache_file(weight: Tensor) -> Path:
    digest = hashlib.sha256(
        f"{LEADING} {_OVERSAMPLE} {_DEPTH} {_MOST_STEPS} {_TOLERANCE} {_SEED} {tuple(weight.shape)}".encode()
    )
    for rows in weight.split(1024):
        digest.update(rows.float().contiguous().numpy().data)
    return cache_folder() / "singular-vectors" / f"{digest.hexdigest()}.safetensors"


def _read_cache(path: Path) -> SingularVectors | None:
    try:
        with safe_open(path, framework="pt") as opened:
            u, s, v, error = (opened.get_tensor(key) for key in ("u", "s", "v", "error"))
    except (OSError, SafetensorError):  # missing or incomplete: it is computed again
        return None
    return SingularVectors(u.double(), s.double(), v.double(), float(error))


def _write_cache(path: Path, vectors: SingularVectors) -> None:
    tensors = {"u": vectors.u.float(), "s": vectors.s, "v": vectors.v.float(), "error": torch.tensor(vectors.error)}
    with contextlib.suppress(StorageError), atomic_write(path) as part:  # a full disk costs time, not the result
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, part)
