"""How an update is put into one weight: in 16 bits, in 4 bits from a 16-bit source, or in 4 bits without one.

Every function returns the new weight together with the real change, so that it can be held against the intended one.
"Real" is the new weight less what the same way of storing makes of the base alone; else the rounding of the base, which
is there without any merge, would count as change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...layers import AdaptedLayer
from ...quantization import QuantizedWeight, quantize
from ...quantization.policy import WeightFormat
from ..low_rank import LowRank, added


@dataclass(frozen=True)
class MergeUpdate:
    """What a merge is to add to one weight: the sum of its adapters' updates.

    Attributes:
        layer, names: the adapted layer, and the adapters; in one order whatever the caller's, so that their sum does
            not depend on it.
        dense: the update in the weight's shape, fp32 or better.
    """

    layer: AdaptedLayer
    names: tuple[str, ...]
    dense: Tensor

    @staticmethod
    def of(layer: AdaptedLayer, names: Iterable[str]) -> MergeUpdate:
        """Sum the updates of some adapters of a layer, each in relation to the layer's own base weight."""
        ordered = tuple(sorted(names))
        dtype = torch.promote_types(torch.float32, layer.lora_A[ordered[0]].dtype)
        dense = torch.stack([layer.delta_weight(name).to(dtype) for name in ordered]).sum(0)
        return MergeUpdate(layer, ordered, dense)

    def factored(self) -> tuple[LowRank, Tensor | None]:
        """Return (low-rank part, gain): dense = (gain - 1) * W + low-rank part, row by row; gain None: 1.

        DoRA has a gain, which is in its low-rank part too.
        """
        dtype, parts, total = self.dense.dtype, [], None
        for name in self.names:
            up, down = (factor.to(dtype) for factor in self.layer.factors(name))
            gain = self.layer.gain(name, dtype)
            if gain is not None:
                gain = gain.to(dtype)
                up, total = gain[:, None] * up, gain if total is None else total + gain - 1
            parts.append(LowRank(up, down))
        return added(parts), total


@dataclass(frozen=True)
class MergedWeight:
    """A weight with its update.

    Attributes:
        weight: what is stored.
        real: how far that is from the same storage of the base alone, in fp32 or better; the residual is included.
        how: in a few words, for the report.
        residual: the low-rank part that is kept beside a 4-bit weight.
        limited: whether something was left out because of a limit on the residual's rank.
    """

    weight: Tensor | QuantizedWeight
    real: Tensor
    how: str
    residual: LowRank | None = None
    limited: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its residual."""
        factors = [] if self.residual is None else [self.residual.up, self.residual.down]
        return self.weight.nbytes + sum(factor.nbytes for factor in factors)


def merged_dense(base: Tensor, update: Tensor, dtype: torch.dtype, how: str) -> MergedWeight:
    """Return base + update, summed in fp32 and rounded once to `dtype`."""
    wide = base.to(update.dtype)
    weight = (wide + update).to(dtype)
    return MergedWeight(weight, weight.to(update.dtype) - wide.to(dtype).to(update.dtype), how)


def merged_4bit(base: Tensor, update: Tensor, form: WeightFormat, source_dtype: torch.dtype, how: str) -> MergedWeight:
    """Return quantize(base + update).

    From a 16-bit base this keeps an update however small: a weight near the border of two codes tips over with a
    probability that grows with its update, so the codes follow it on average. A base that was dequantized lies in the
    middle of its codes, and none tips over.
    """
    weight = quantized(base.to(update.dtype) + update, form, source_dtype)
    before = quantized(base.to(update.dtype), form, source_dtype)
    return MergedWeight(weight, weight.dequantize(update.dtype) - before.dequantize(update.dtype), how)


def merged_4bit_with_residual(
    weight: QuantizedWeight, update: MergeUpdate, rank: int | None, dtype: torch.dtype
) -> MergedWeight:
    """Put an update into a weight of which only the 4 bits are left, with a low-rank part for what they cannot hold.

    The low-rank update itself is what rounding would lose of it, as long as it is small; so the codes are kept (DoRA's
    gain goes into the scales), and it stays as it is, at its own rank. Where less than that rank is allowed, new codes
    with the best low-rank part of what they miss (Eckart-Young) are the other way: of the two, the nearer one is
    taken.

    Args:
        rank: most columns of the low-rank part; None: as many as the update has.
        dtype: of the low-rank part's matrices.
    """
    wide = update.dense.dtype
    base = weight.dequantize(wide)
    low_rank, gain = update.factored()
    codes = weight if gain is None else quantized_like(gain[:, None] * base, weight)
    kept = _with_residual(codes, base, low_rank, rank, dtype, "4 bits, codes kept")
    if rank is None or rank >= low_rank.rank:
        return kept
    codes = quantized_like(base + update.dense, weight)
    missed = update.dense - (codes.dequantize(wide) - base)
    new = _with_residual(codes, base, _leading(missed, rank), rank, dtype, "4 bits, new codes")
    nearer = min(kept, new, key=lambda way: float((way.real - update.dense).norm()))
    return replace(nearer, limited=True)


def quantized(values: Tensor, form: WeightFormat, source_dtype: torch.dtype) -> QuantizedWeight:
    """Quantize values in fp32; `source_dtype` is what the result says it was made from, as files record it."""
    weight = quantize(values.float(), form.quant_type, form.block_size, form.double_quant)
    return replace(weight, dtype=source_dtype)


def quantized_like(values: Tensor, like: QuantizedWeight) -> QuantizedWeight:
    """Quantize values in the format of another weight."""
    return quantized(values, format_of(like), like.dtype)


def format_of(weight: QuantizedWeight) -> WeightFormat:
    """Return how a weight is quantized."""
    return WeightFormat(weight.quant_type, weight.block_size, weight.double_quant)


def least_rank(update: LowRank, share: float) -> int:
    """Return the least rank at which the best approximation of an update keeps a share of its square norm."""
    energy = update.singular_values.double().square()
    kept = energy.cumsum(0) / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return min(len(energy), int((kept < share).sum()) + 1)


def _with_residual(
    codes: QuantizedWeight, base: Tensor, residual: LowRank, rank: int | None, dtype: torch.dtype, how: str
) -> MergedWeight:
    rank = residual.rank if rank is None else min(rank, residual.rank)
    part = residual.to(torch.float64).truncated(rank).to(dtype)
    real = codes.dequantize(base.dtype) - base + part.to(base.dtype).dense()
    return MergedWeight(codes, real, f"{how} + rank {rank}" if rank else how, part if rank else None)


def _leading(matrix: Tensor, rank: int) -> LowRank:
    """Return nearly the best approximation of a rank: by a random projection, sharpened by four power iterations."""
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)  # the same merge gives the same bytes
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=4)
    return LowRank(u[:, :rank] * s[:rank], v[:, :rank].T)
