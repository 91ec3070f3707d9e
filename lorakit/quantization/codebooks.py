"""The codebooks of 4-bit weights, one line each in `QUANT_TYPES`, and the dynamic map of 8-bit scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..errors import ConfigError, did_you_mean


@dataclass(frozen=True, eq=False)
class Codebook:
    """The values that codes stand for, and the boundaries between them.

    Attributes:
        name: the name in checkpoints: one of `QUANT_TYPES`.
        values: (codes,) fp32, by code.
        boundaries: (distinct - 1,) fp32, ascending: midpoints of neighbouring distinct values. An element's code is
            order[number of boundaries strictly below it], so an element on a boundary takes the lower value.
        order: (distinct,) uint8, the codes in ascending order of their values; of equal values only the lowest code.
    """

    name: str
    values: Tensor
    boundaries: Tensor
    order: Tensor

    @staticmethod
    def from_values(name: str, values: Tensor) -> Codebook:
        """Build a codebook from its values by code, (codes,) fp32. Equal values are encoded as the lowest code."""
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
    the remaining bits: one value near 1e-7, 64 in the top decade. Each sign has 127 values; zero (code 127) and 1.0
    complete the map. The unsigned map is for the second moment of an optimizer (Dettmers et al. 2021, arXiv:2110.02861,
    section 2.2). There the sign bit refines the fraction: two values near 1e-7, 128 in the top decade, and zero is code
    0.
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


def normal_float(bits: int, offset: float) -> Tensor:
    """Return NormalFloat's values, (2^bits,) fp32, ascending (QLoRA, arXiv:2305.14314, eq. 4 and appendix E).

    The values are quantiles of a standard normal, from `offset` down to 0.5 in even steps, divided by the largest. Zero
    is exact: 2^(bits - 1) quantiles are above it and one less below. Quantiles are computed in fp64. Probabilities and
    quantiles are rounded to fp32 before the division, as in bitsandbytes' create_normal_map, which made the published
    values.
    """
    half = 2 ** (bits - 1)
    positive, negative = _quantiles(offset, half), _quantiles(offset, half - 1)
    return torch.cat([-negative, positive.new_zeros(1), positive.flip(0)]) / positive[0]


def _quantiles(offset: float, count: int) -> Tensor:
    """Return quantiles of a standard normal at `count` even steps from `offset` to above 0.5, (count,) fp32."""
    highest = float(torch.tensor(offset, dtype=torch.float32))
    # Steps in fp64, then rounded: in fp32, torch.linspace may give different last bits on different processors.
    probabilities = torch.linspace(highest, 0.5, count + 1, dtype=torch.float64)[:-1].float()
    quantiles: Tensor = torch.special.ndtri(probabilities.double())
    return quantiles.float()


def float4() -> Tensor:
    """Return FP4's values by code, (16,) fp32: a sign bit, two exponent bits e and one of mantissa m.

    The magnitude is 2^(4 - e)·(1 + m / 2) / 12, or m / 16 / 12 if e = 0. The codes are not in ascending order.
    """
    code = torch.arange(8, dtype=torch.int32)
    e, m = (code >> 1).float(), (code & 1).float()
    magnitudes = torch.where(e == 0, m / 16, torch.exp2(4.0 - e) * (1 + m / 2)) / 12
    return torch.cat([magnitudes, 0.0 - magnitudes])  # 0 - x, so that both codes of zero give +0.0


# The 4-bit codebooks: name in checkpoints -> function of the block size that returns the values by code, (16,) fp32.
QUANT_TYPES: dict[str, Callable[[int], Tensor]] = {
    "nf4": lambda block_size: normal_float(bits=4, offset=0.9677083),
    "fp4": lambda block_size: float4(),
}
_built: dict[tuple[str, Callable[[int], Tensor], int], Codebook] = {}  # name, its values, block size -> codebook


def codebook(quant_type: str, block_size: int = 64) -> Codebook:
    """Return the 4-bit codebook with this name for blocks of this size.

    Raises:
        ConfigError: there is none.
    """
    check_quant_type(quant_type)
    values = QUANT_TYPES[quant_type]
    key = quant_type, values, block_size
    if key not in _built:
        with torch.device("cpu"), torch.inference_mode(False):  # wherever it is first asked for, it is kept for all
            _built[key] = Codebook.from_values(quant_type, values(block_size))
    return _built[key]


def check_quant_type(quant_type: str) -> None:
    """Raise ConfigError unless there is a codebook with this name."""
    if quant_type not in QUANT_TYPES:
        known = ", ".join(QUANT_TYPES)
        raise ConfigError(f"unknown quant_type '{quant_type}'{did_you_mean(quant_type, QUANT_TYPES)} (known: {known})")
