"""The codebooks: NF4 and FP4 for weights, and the 8-bit dynamic map that double quantization stores its scales in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..errors import ConfigError, did_you_mean

# Quantiles of a standard normal, normalized to [-1, 1] with an exact zero (QLoRA, arXiv:2305.14314, section 3 and
# appendix E): eight steps below zero, seven above. These are the fp32 values that bitsandbytes' files are written with.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# A sign bit, two exponent bits and one of mantissa, in units of 1/12, by code: the order is not ascending.
FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@dataclass(frozen=True, eq=False)
class Codebook:
    """The values that codes stand for, and the boundaries between them.

    Attributes:
        name: as in checkpoints: "nf4", "fp4".
        values: (codes,) fp32, by code.
        boundaries: (distinct - 1,) fp32, ascending: midpoints of neighbouring distinct values. A scaled element has as
            many boundaries strictly below it as its code has in `order`, so one on a boundary takes the lower value.
        order: (distinct,) uint8, the codes in ascending order of their values; of equal values only the lowest code.
    """

    name: str
    values: Tensor
    boundaries: Tensor
    order: Tensor

    @staticmethod
    def from_values(name: str, values: Tensor) -> Codebook:
        """Build a codebook from its values by code, (codes,) fp32; equal values are written as the lowest code."""
        distinct, first = torch.unique(values, return_inverse=True)  # ascending
        order = torch.tensor([int((first == i).nonzero()[0]) for i in range(len(distinct))], dtype=torch.uint8)
        return Codebook(name, values, (distinct[1:] + distinct[:-1]) / 2, order)

    @property
    def zero(self) -> int:
        """The code of 0.0."""
        return int(self.order[int(torch.bucketize(0.0, self.boundaries))])


@cache
def dynamic_map(signed: bool = True) -> Codebook:
    """Return the 8-bit dynamic map (Dettmers 2015, arXiv:1511.04561; 256 fp32 values).

    A code is a sign, a decimal exponent given by the number of leading zero bits, and a linear fraction in [0.1, 1) in
    the bits that remain: one value near 1e-7, 64 in the top decade. Each sign has 127; zero (code 127) and 1.0 complete
    the map. Unsigned, for the second moment of an optimizer (Dettmers et al. 2021, arXiv:2110.02861, section 2.2), the
    bit of the sign refines the fraction: two values near 1e-7, 128 in the top decade, and zero is code 0.
    """
    positive: list[float] = []
    for decade in range(7):
        edges = _edges(2 ** (decade + (not signed)))
        positive += (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    values = sorted([*positive, *((-x for x in positive) if signed else ()), 0.0, 1.0])
    return Codebook.from_values("dynamic", torch.tensor(values, dtype=torch.float32))


def _edges(count: int) -> Tensor:
    """Return the edges of `count` equal parts of [0.1, 1], (count + 1,) fp32, each rounded once, on every processor.

    They are those of torch.linspace where the processor fuses the product and the sum. Where it does not, linspace
    rounds twice, and a sixth of the map is one unit off: the same file would hold other weights.
    """
    start, end = torch.tensor([0.1, 1.0], dtype=torch.float32)
    step = ((end - start) / count).double()
    index = torch.arange(count + 1, dtype=torch.float64)
    upward, downward = start.double() + step * index, end.double() - step * (count - index)
    return torch.where(index < (count + 1) // 2, upward, downward).float()


def _fp4() -> Tensor:
    magnitudes = torch.tensor(FP4, dtype=torch.float32) / 12
    return torch.cat([magnitudes, 0.0 - magnitudes])  # 0 - x, so that both codes of zero give +0.0


QUANT_TYPES = {
    "nf4": Codebook.from_values("nf4", torch.tensor(NF4, dtype=torch.float32)),
    "fp4": Codebook.from_values("fp4", _fp4()),
}


def codebook(quant_type: str) -> Codebook:
    """Return the 4-bit codebook of that name.

    Raises:
        ConfigError: there is none.
    """
    if quant_type not in QUANT_TYPES:
        known = ", ".join(QUANT_TYPES)
        raise ConfigError(f"unknown quant_type '{quant_type}'{did_you_mean(quant_type, QUANT_TYPES)} (known: {known})")
    return QUANT_TYPES[quant_type]
