"""A few values of one weight, and whether those of two weights can come from one weight by rounding or quantization."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...quantization import NestedScales, QuantizedWeight
from ...quantization.weight import SOURCE_DTYPES

_RUNS, _RUN = 8, 8  # a sample is so many runs of so many neighbours: few pages of a file, many places in a weight

# Half the largest step of the dynamic map, relative to the largest scale: 0.9 in 64 steps. Double quantization moves a
# scale by that much.
_SCALE_ERROR = 0.9 / 64 / 2
_ROUNDING = 2.0**-8  # of a bf16 value: that to 8 bits, and one before it to fp16
_FLUSHED = 2.0**-24  # fp16 moves smaller values by up to this much


@dataclass(frozen=True)
class WeightSample:
    """Values at fixed places of one weight.

    Attributes:
        form: "" for a dense weight, else the 4-bit type and block size, such as "nf4/64".
        shape: of the weight.
        dtype: of the values, such as "bfloat16".
        values: (n,).
        bounds: (2, n) fp32, the cells of 4-bit codes: the source's values are between them. None for a dense weight.
    """

    form: str
    shape: tuple[int, ...]
    dtype: str
    values: Tensor
    bounds: Tensor | None = None

    def to_bytes(self) -> bytes:
        """Return the values, and the bounds after them."""
        tensors = [self.values] if self.bounds is None else [self.values, self.bounds]
        return b"".join(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)

    @staticmethod
    def from_bytes(form: str, shape: tuple[int, ...], dtype: str, data: bytes) -> tuple[WeightSample, bytes]:
        """Return the sample at the beginning of `data`, and the rest of `data`.

        Raises:
            ValueError: the data are too short, or the shape is none.
        KeyError: the dtype is none of a weight's.
        """
        known = {str(one).removeprefix("torch."): one for one in SOURCE_DTYPES}
        if min(shape, default=0) < 0:
            raise ValueError("a negative size")
        count = len(places(math.prod(shape)))
        if not count:
            return WeightSample(form, shape, dtype, torch.empty(0), None), data
        values, data = _taken(data, known[dtype], count)
        bounds = None
        if form:
            bounds, data = _taken(data, torch.float32, 2 * count)
            bounds = bounds.view(2, count)
        return WeightSample(form, shape, dtype, values, bounds), data

    def agrees(self, other: WeightSample) -> bool:
        """Return whether both samples can be of one weight."""
        if self.bounds is None and other.bounds is None:
            return same_values(self.values, other.values)
        count = self.values.numel()
        low, high = self._cells()
        other_low, other_high = other._cells()
        fits = (low <= other_high) & (other_low <= high)
        if self.form == other.form:  # a neighbour's cell touches this one
            fits = (low - other_low).abs() <= (high - low) / 4
        return int((~fits).sum()) <= count // 16

    def _cells(self) -> tuple[Tensor, Tensor]:
        """Return the least and the largest value that the source can have."""
        if self.bounds is not None:
            return self.bounds[0], self.bounds[1]
        values = self.values.float()
        slack = values.abs() * _ROUNDING + _FLUSHED
        return values - slack, values + slack


def _taken(data: bytes, dtype: torch.dtype, count: int) -> tuple[Tensor, bytes]:
    size = count * dtype.itemsize
    if len(data) < size:
        raise ValueError("too few values")
    return torch.frombuffer(bytearray(data[:size]), dtype=dtype), data[size:]


def places(numel: int) -> Tensor:
    """Return the places of a weight that are sampled, (n,) indices of its flat values: all of them if there are few."""
    if numel <= _RUNS * _RUN:
        return torch.arange(numel)
    starts = [(numel - _RUN) * run // (_RUNS - 1) for run in range(_RUNS)]
    return (torch.tensor(starts)[:, None] + torch.arange(_RUN)).flatten()


def sample_dense(weight: Tensor) -> WeightSample | None:
    """Return a sample of a dense weight of any shape; None if it cannot be read, as on the meta device."""
    is_plain = type(weight.data) is Tensor and weight.layout == torch.strided
    if weight.is_meta or not is_plain or weight.dtype not in (*SOURCE_DTYPES, torch.float64):
        return None
    flat = weight.detach().reshape(-1)
    values = flat[places(flat.numel()).to(flat.device)].cpu()
    values = values.float() if values.dtype == torch.float64 else values
    return WeightSample("", tuple(weight.shape), str(values.dtype).removeprefix("torch."), values)


def sample_4bit(weight: QuantizedWeight) -> WeightSample | None:
    """Return a sample of a 4-bit weight: its values, and the cells around them; None if it has no values to read."""
    if weight.packed.is_meta:
        return None
    index = places(weight.numel).to(weight.packed.device)
    packed, book = weight.packed.reshape(-1)[index // 2], weight.code_values.float()
    codes = torch.where(index % 2 == 0, packed >> 4, packed & 15).long()
    blocks = index // weight.block_size
    absmax = weight.absmax[blocks].float()
    edges, rank = torch.unique(book, return_inverse=True)  # ascending
    middles = (edges[1:] + edges[:-1]) / 2
    lowest, highest = torch.cat([edges[:1], middles]), torch.cat([middles, edges[-1:]])
    bounds = torch.stack([lowest[rank[codes]], highest[rank[codes]]])
    slack = bounds.abs() * absmax * _ROUNDING
    if isinstance(weight.scales, NestedScales):
        nested = weight.scales.absmax[blocks // weight.scales.block_size].abs()
        slack = slack + bounds.abs() * nested * _SCALE_ERROR
    bounds = bounds * absmax
    cells = torch.stack([bounds[0] - slack[0], bounds[1] + slack[1]]).cpu()
    form = f"{weight.quant_type}/{weight.block_size}"
    return WeightSample(form, tuple(weight.shape), "float32", (book[codes] * absmax).cpu(), cells)


def same_values(first: Tensor, second: Tensor) -> bool:
    """Return whether two dense weights of one shape, or samples of them, are one weight in two dtypes.

    fp32 weights are one if they are equal. If one has been rounded, the other is rounded alike and compared. A weight
    that went from fp32 through fp16 to bf16 was rounded twice. It differs from the weight rounded once where the first
    step made a tie and the second took the other side: in one of 16 values, by one unit.
    """
    a, b = first.detach().reshape(-1), second.detach().reshape(-1)
    if torch.equal(a, b):
        return True
    coarse = next((dtype for dtype in (torch.bfloat16, torch.float16) if _holds(a, dtype) or _holds(b, dtype)), None)
    if coarse is None:
        return torch.equal(a.float(), b.float())
    a, b = a.float().to(coarse).float(), b.float().to(coarse).float()
    apart = (a - b).abs()
    unequal = int((apart > _FLUSHED).sum())
    if coarse == torch.float16:
        return unequal == 0
    one_unit = 2.0**-7 * torch.maximum(a.abs(), b.abs()) + _FLUSHED
    expected = a.numel() / 16
    return bool((apart <= one_unit).all()) and unequal <= expected + 5 * math.sqrt(expected)


def _holds(values: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a dtype can hold all values unchanged."""
    return values.dtype == dtype or torch.equal(values.float().to(dtype).float(), values.float())
