"""How often a quantized weight uses each code, and how often normally distributed weights would."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ...quantization import QuantizedWeight, codebook

_POINTS = 4001  # of the quadrature over a block's absmax


@dataclass(frozen=True)
class CodeUse:
    """One code of a weight.

    Attributes:
        code: its 4 bits, 0 to 15.
        value: the weight that it stands for, as a share of the block's absmax.
        count, share: how often it is used.
        expected: the share that it would have if the weights of each block were independent and normal.
    """

    code: int
    value: float
    count: int
    share: float
    expected: float


def code_use(weight: QuantizedWeight) -> tuple[CodeUse, ...]:
    """Return every code's use, in ascending order of values."""
    counts = weight.codes.flatten().long().bincount(minlength=16).tolist()
    expected = expected_shares(weight.quant_type, weight.block_size)
    values = weight.code_values.tolist()
    order = sorted(range(16), key=lambda code: (values[code], code))
    total = max(1, weight.numel)
    return tuple(CodeUse(code, values[code], counts[code], counts[code] / total, expected[code]) for code in order)


def entropy(uses: tuple[CodeUse, ...]) -> float:
    """Return the information in a code, in bits: 4 if all are used equally often, less otherwise."""
    return -sum(use.share * math.log2(use.share) for use in uses if use.share)


def distance(uses: tuple[CodeUse, ...]) -> float:
    """Return the total variation between the shares and the expected ones: 0 for normal weights, at most 1."""
    return sum(abs(use.share - use.expected) for use in uses) / 2


@cache
def expected_shares(quant_type: str, block_size: int) -> tuple[float, ...]:
    """Return each code's share for blocks of n independent normal weights divided by their absmax.

    M = max |x_i| has the density f(m) = 2 n φ(m) (2 Φ(m) - 1)^(n - 1). One of the n weights is at ±1; the others are
    normal, cut off at ±m. A share is the integral of f(m) (1 - 1/n) (Φ(b m) - Φ(a m)) / (2 Φ(m) - 1) for the code's
    interval from a to b, plus 1 / 2n at either end.
    """
    book = codebook(quant_type, block_size)
    m = torch.linspace(1e-3, 12, _POINTS, dtype=torch.float64)
    within = 2 * _normal(m) - 1
    log_density = (
        math.log(2 * block_size) + (block_size - 1) * within.log() - m.square() / 2 - math.log(2 * math.pi) / 2
    )
    density = log_density.exp()
    edges = torch.cat([torch.tensor([-1.0]), book.boundaries, torch.tensor([1.0])]).double()
    below = torch.trapezoid(density * _normal(edges[:, None] * m) / within, m)  # (edges,)
    inner = below.diff() * (1 - 1 / block_size)
    inner[0] += 1 / (2 * block_size)
    inner[-1] += 1 / (2 * block_size)
    shares = torch.zeros(len(book.values), dtype=torch.float64)
    shares[book.order.long()] = inner  # a code whose value also has a lower code is never written
    return tuple(float(share) for share in shares)


def _normal(x: Tensor) -> Tensor:
    shares: Tensor = torch.special.ndtr(x)
    return shares
