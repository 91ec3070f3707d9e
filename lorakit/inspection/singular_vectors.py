"""Singular vectors of base weights: all of them for small layers, the leading ones by randomized SVD for large.

The randomized ones are kept in the cache folder under a hash of the weight's own bytes, so that a second adapter of the
same base finds them; what they may be off by is computed and kept with them.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import StorageError
from ..files import atomic_write, cache_folder

EXACT_UP_TO = 1024  # rows or columns, whichever is less: 0.1 s a layer; four times the side takes 50 times as long
LEADING = 64  # singular vectors of larger layers
_OVERSAMPLE = 16
_ITERATIONS = 8
_SEED = 0


@dataclass(frozen=True)
class SingularVectors:
    """U diag(S) Vᵀ, the leading part of a weight or all of it, in float64.

    Attributes:
        u (out, k), s (k,) in falling order, v (in, k).
        error: every s is within error of a singular value of the weight, and sin of the angle between its u and the
            true one is at most error / gap, with the gap from s to the next other singular value (Wedin 1972).
        complete: whether these are all singular vectors of nonzero singular value.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    error: float
    complete: bool


def singular_vectors(weight: Tensor) -> SingularVectors:
    """Decompose a weight (out, in): completely up to EXACT_UP_TO, else its LEADING triplets, cached on disk."""
    if min(weight.shape) <= EXACT_UP_TO:
        return complete_vectors(weight)
    path = _cache_file(weight)
    found = _read_cache(path)
    if found is None:
        generator = torch.Generator().manual_seed(_SEED)
        start = torch.randn(weight.shape[1], LEADING + _OVERSAMPLE, generator=generator, dtype=torch.float32)
        found = leading_vectors(weight, start, LEADING)
        _write_cache(path, found)
    return found


def complete_vectors(weight: Tensor) -> SingularVectors:
    """All singular vectors, from the eigenvectors of the smaller of W Wᵀ and Wᵀ W in float64.

    Singular values below 1e-7 of the largest are left out: squared they are lost in rounding.
    """
    matrix = weight.double()
    is_wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T if is_wide else matrix.T @ matrix)
    s = squares.flip(0).clamp(min=0).sqrt()
    kept = s > 1e-7 * s[0]
    s, near = s[kept], vectors.flip(1)[:, kept]
    far = (matrix.T @ near if is_wide else matrix @ near) / s
    u, v = (near, far) if is_wide else (far, near)
    top = slice(0, 1)  # the rounding of all is that of the largest, relative to it
    error = float((matrix @ v[:, top] - u[:, top] * s[top]).norm()) if s.numel() else 0.0
    return SingularVectors(u, s, v, error, True)


def leading_vectors(weight: Tensor, start: Tensor, k: int, change: tuple[Tensor, Tensor] | None = None) -> SingularVectors:
    """Randomized subspace iteration (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1).

    Args:
        weight: (out, in), any floating dtype; products run in float32.
        start: (in, k + some more), what to start from.
        change: up (out, r) and down (r, in), added to the weight without being multiplied out.
    """
    matrix = weight.float()
    up, down = (part.float() for part in change) if change else (matrix.new_zeros(len(matrix), 0), matrix.new_zeros(0, matrix.shape[1]))

    def apply(x: Tensor) -> Tensor:
        return matrix @ x + up @ (down @ x)

    def apply_transposed(y: Tensor) -> Tensor:
        return matrix.T @ y + down.T @ (up.T @ y)

    basis = torch.linalg.qr(apply(start.float())).Q  # (out, block)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(apply(torch.linalg.qr(apply_transposed(basis)).Q)).Q
    v, s, small = torch.linalg.svd(apply_transposed(basis), full_matrices=False)
    v, s, u = v[:, :k], s[:k], (basis @ small.T)[:, :k]
    error = float((apply(v) - u * s).norm(dim=0).max())  # Wᵀu = s·v holds by construction; this is the other side
    return SingularVectors(u.double(), s.double(), v.double(), error, False)


def _cache_file(weight: Tensor) -> Path:
    digest = hashlib.sha256(f"{LEADING} {_OVERSAMPLE} {_ITERATIONS} {_SEED} {tuple(weight.shape)}".encode())
    for rows in weight.split(1024):
        digest.update(rows.float().contiguous().numpy().data)
    return cache_folder() / "singular-vectors" / f"{digest.hexdigest()}.safetensors"


def _read_cache(path: Path) -> SingularVectors | None:
    try:
        with safe_open(path, framework="pt") as opened:
            u, s, v, error = (opened.get_tensor(key) for key in ("u", "s", "v", "error"))
    except (OSError, SafetensorError):  # not there, or not whole: it is computed anew
        return None
    return SingularVectors(u.double(), s.double(), v.double(), float(error), False)


def _write_cache(path: Path, found: SingularVectors) -> None:
    tensors = {"u": found.u.float(), "s": found.s, "v": found.v.float(), "error": torch.tensor(found.error)}
    with contextlib.suppress(StorageError), atomic_write(path) as part:  # a full disk costs time, not the result
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, part)
