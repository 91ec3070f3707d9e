"""How far a rounded result may be from the exact one: bounds that follow from the arithmetic, not from a trial.

A number rounded to a dtype is off by at most u = eps / 2 of itself. A sum of n products therefore is off by at most
n·u·Σ|a||b|, whatever the order of addition and whoever adds (Higham 2002, Accuracy and Stability of Numerical
Algorithms, eq. 3.5). Roundings go either way, so that also λ·sqrt(n)·u·Σ|a||b| holds, with probability
1 - 2·n·exp(-λ²/2) (Higham and Mary 2019, doi:10.1137/18M1226312): for λ = 10 and n = 10^7 it fails once in 10^14.

Three ways to compare, the first one best:

- bit equality, where both sides do the same arithmetic in the same order;
- `assert_within` a `rounding` of the result in float64, where Σ|a||b| is at hand;
- `assert_alike` for two computations of one thing through several layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LAMBDA = 10.0

# Roundings through `made.small_decoder`. A layer adds up 32 terms for queries, keys and values, 8 or 16 for a
# score, a row of probabilities, 64 for its output, twice 32 for the MLP's halves, 48 for its output; two norms, the
# rotation and the functions make it 256 at most. Two layers; the last norm and the head are 64.
SMALL_DECODER = 2 * 256 + 64


# The same of SmolLM2-135M, for up to 520 tokens: 576 for queries, keys and values, 64 for a score, a row of
# probabilities, 576 for the output, twice 576 for the MLP's halves, 1,536 for its output, two norms of half of 576, 96
# for the rotation and the functions. Thirty layers; the last norm and the head are 864.
SMOLLM2 = 30 * (5 * 576 + 64 + 520 + 1536 + 96) + 864


def unit(dtype: torch.dtype) -> float:
    """Return u, the largest relative error of one rounding to the dtype."""
    return torch.finfo(dtype).eps / 2


def rounding(terms: int, magnitude: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return how far a sum of `terms` products may be from the exact one, float64.

    Args:
        terms: roundings that a summand goes through at most; sums that follow each other add their numbers.
        magnitude: Σ|a||b| of each result, or the largest.
        dtype: of the accumulator.
    """
    growth = min(float(terms), LAMBDA * math.sqrt(terms))
    return growth * unit(dtype) * torch.as_tensor(magnitude, dtype=torch.float64).detach()


def matmul_rounding(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32, more: int = 1) -> Tensor:
    """Return `rounding` of each element of a @ b; `more` counts the roundings besides those of the sum."""
    return rounding(a.shape[-1] + more, a.detach().double().abs() @ b.detach().double().abs(), dtype)


def factored(rows: int, columns: int) -> int:
    """Return the roundings behind the singular values of a matrix, for `rounding` of its norm.

    Reflections bring the matrix to two diagonals, from the left and from the right; each of them takes a number through
    rows * columns roundings (Higham 2002, theorem 19.4). As many rotations follow. What comes out is the exact result
    for a matrix that near, so its singular values and nearest matrices' distances are that near too (Weyl). Directions
    are that near divided by the gap between their singular values (Davis and Kahan 1970).
    """
    return 4 * rows * columns


# Up to a condition number of 700, which multiplies its error, `LowRank.triangles` takes Cholesky's decomposition of a
# factor's products; there are two factors.
THROUGH_CHOLESKY = 2 * 700


def of_factors(up: Tensor, down: Tensor) -> Tensor:
    """Return how far the distances, products and nearest matrices of up @ down may be, computed from the two.

    Both are decomposed, and so is the small matrix between their bases, which is at most the product of their norms.
    """
    (rows, rank), columns = up.shape, down.shape[1]
    terms = factored(rows, rank) + factored(columns, rank) + factored(rank, rank)
    return rounding(terms, up.double().norm() * down.double().norm(), up.dtype)


def assert_within(found: Tensor | float, exact: Tensor | float, bound: Tensor | float) -> None:
    """Assert that each element of `found` is at most `bound` from that of `exact`, of the same shape."""
    found, exact = (torch.as_tensor(side, dtype=torch.float64).detach() for side in (found, exact))
    assert found.shape == exact.shape, (found.shape, exact.shape)
    error = (found - exact).abs()
    allowed = torch.as_tensor(bound, dtype=torch.float64).detach().expand(error.shape)
    off = ~((error <= allowed) | (found == exact))  # so that nan is off, and an infinity that is expected is not
    assert not off.any(), (
        f"{int(off.sum())} of {off.numel()} are off, by up to {float(error[off].max()):.3g} "
        f"where {float(allowed[off].max()):.3g} is allowed"
    )


def assert_alike(found: object, expected: object, terms: int, stores: int = 1) -> None:
    """Assert that two tensors, or two collections of them, are roundings of one value.

    Each addition rounds a partial sum, which among summands of either sign is no larger than the result: n roundings
    that go either way leave about sqrt(n)·u / 2 of it, in the root mean square. Each of the two may be off by four
    times sqrt(n)·u of the largest element, some twenty standard deviations.

    Args:
        terms: n, the roundings in fp32, or in float64 where the tensors are, that a summand goes through at most.
        stores: roundings to the tensors' dtype on top, where it is shorter than fp32.
    """
    if isinstance(expected, Mapping):
        assert isinstance(found, Mapping) and found.keys() == expected.keys()
        found, expected = list(found.values()), [expected[key] for key in found]
    if not isinstance(expected, Tensor):
        assert isinstance(found, Sequence) and isinstance(expected, Sequence) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other, terms, stores)
        return
    assert isinstance(found, Tensor) and found.dtype == expected.dtype
    largest = expected.detach().double().abs().nan_to_num(0.0, 0.0, 0.0).max() if expected.numel() else 0.0
    bound = min(terms, 4 * math.sqrt(terms)) * unit(torch.promote_types(found.dtype, torch.float32)) * float(largest)
    if found.dtype.itemsize < 4:
        bound += stores * unit(found.dtype) * float(largest)
    assert_within(found, expected, 2 * bound)  # each of them may be off


def assert_alike_in_mean(found: Tensor, expected: Tensor, stores: int) -> None:
    """Assert that two tensors in 16 bits are roundings of one value, in the root mean square.

    Each of the two may be off by sqrt(n)·u, twice what n roundings leave on average.

    Args:
        stores: n, the roundings to the tensors' dtype that a summand goes through at most.
    """
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    error, size = (found.double() - expected.double()).norm(), expected.double().norm()
    assert error <= 2 * math.sqrt(stores) * unit(expected.dtype) * size, float(error / size)


def assert_gradients_alike(found: Sequence[Tensor], expected: Sequence[Tensor], terms: int) -> None:
    """Assert that the gradients of several tensors are alike, next to the largest of them all.

    Some are nothing but rounding, as those of queries and keys are where every token sees only itself.
    """
    assert [one.shape for one in found] == [one.shape for one in expected]
    assert_alike(torch.cat([one.flatten() for one in found]), torch.cat([one.flatten() for one in expected]), terms)
