"""How an update is put into one weight: in 16 bits, in 4 bits from a 16-bit source, or in 4 bits without one.

Every function returns the new weight together with the real change, so that it can be held against the intended one.
"Real" is the new weight less what the same way of storing makes of the base alone; else the rounding of the base, which
is there without any merge, would count as change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layers import AdaptedLayer
from ..quantization import QuantizedWeight, quantize
from ..quantization.policy import WeightFormat
from .low_rank import LowRank, added


@dataclass(frozen=True)
class Update:
    """What a merge is to add to one weight: the sum of its adapters' updates.

    Attributes:
        dense: in the weight's shape, fp32 or better.
        low_rank: the part of it that is a product of small matrices, (out, in); scaling and gain are in it.
        gain: (out,) or None: DoRA multiplies each row of the base by it, too, so that
            dense = (gain - 1) * W + low_rank.
    """

    dense: Tensor
    low_rank: LowRank
    gain: Tensor | None = None

    @staticmethod
    def of(layer: AdaptedLayer, names: Sequence[str]) -> Update:
        """Sum the updates of some adapters of a layer, each in relation to the layer's own base weight."""
        dtype = torch.promote_types(torch.float32, layer.lora_A[names[0]].dtype)
        ordered = sorted(names)  # a sum does not depend on the order of merging, to the bit
        dense = torch.stack([layer.delta_weight(name).to(dtype) for name in ordered]).sum(0)
        parts, gain = [], None
        for name in ordered:
            up, down = (factor.to(dtype) for factor in layer.factors(name))
            own = layer.variants[name].gain(layer, name, dtype)
            if own is not None:
                up = own.to(dtype)[:, None] * up
                gain = own.to(dtype) if gain is None else gain + own.to(dtype) - 1
            parts.append(LowRank(up, down))
        return Update(dense, added(parts), gain)


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
    weight: QuantizedWeight, update: Update, rank: int | None, dtype: torch.dtype
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
    codes = weight if update.gain is None else quantized_like(update.gain[:, None] * base, weight)
    kept = _with_residual(codes, base, update.low_rank, rank, dtype, "4 bits, codes kept")
    if rank is None or rank >= update.low_rank.rank:
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
    return quantized(values, WeightFormat(like.quant_type, like.block_size, like.double_quant), like.dtype)


def least_rank(update: LowRank, share: float) -> int:
    """Return the least rank at which the best approximation of an update keeps a share of its square norm."""
    energy = update.singular_values.double().square()
    kept = energy.cumsum(0) / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return min(len(energy), int((kept < share).sum()) + 1)


def _with_residual(
    codes: QuantizedWeight, base: Tensor, residual: LowRank, rank: int | None, dtype: torch.dtype, how: str
) -> MergedWeight:
    rank = residual.rank if rank is None else min(rank, residual.rank)
    part = LowRank(residual.up.double(), residual.down.double()).truncated(rank)
    part = LowRank(part.up.to(dtype), part.down.to(dtype))
    change = LowRank(part.up.to(base.dtype), part.down.to(base.dtype)).dense()
    real = codes.dequantize(base.dtype) - base + change
    return MergedWeight(codes, real, f"{how} + rank {rank}" if rank else how, part if rank else None)


def _leading(matrix: Tensor, rank: int) -> LowRank:
    """Return nearly the best approximation of a rank: by a random projection, sharpened by four power iterations."""
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)  # the same merge gives the same bytes
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=4)
    return LowRank(u[:, :rank] * s[:rank], v[:, :rank].T)
