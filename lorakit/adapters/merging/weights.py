"""Adding an update to one weight: in 16 bits, in 4 bits from a 16-bit source, or in 4 bits without one.

Every function returns the new weight and the real change, for comparison with the intended one. The real change is the
new weight minus the base alone stored in the same way. Otherwise the rounding of the base, which needs no merge, would
count as change.
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
    """The sum of the adapters' updates that a merge adds to one weight.

    Attributes:
        layer: the adapted layer.
        names: of the adapters, sorted, so that the sum does not depend on the caller's order.
        dense: the update in the weight's shape, fp32 or better.
    """

    layer: AdaptedLayer
    names: tuple[str, ...]
    dense: Tensor

    @staticmethod
    def of(layer: AdaptedLayer, names: Iterable[str]) -> MergeUpdate:
        """Sum the updates of some adapters of a layer, each one's change of the layer's base weight."""
        ordered = tuple(sorted(names))
        dtype = torch.promote_types(torch.float32, layer.lora_A[ordered[0]].dtype)
        dense = torch.stack([layer.delta_weight(name).to(dtype) for name in ordered]).sum(0)
        return MergeUpdate(layer, ordered, dense)

    def factored(self) -> tuple[LowRank, Tensor | None]:
        """Return (low-rank part, gain) with dense = (gain - 1) * W + low-rank part, row by row.

        The gain, (out_features,), is None for 1. DoRA has a gain, which scales its low-rank part too.
        """
        dtype, low_rank, total = self.dense.dtype, [], None
        for name in self.names:
            up, down = (factor.to(dtype) for factor in self.layer.factors(name))
            gain = self.layer.gain(name, dtype)
            if gain is not None:
                gain = gain.to(dtype)
                up, total = gain[:, None] * up, gain if total is None else total + gain - 1
            low_rank.append(LowRank(up, down))
        return added(low_rank), total


@dataclass(frozen=True)
class MergedWeight:
    """A weight with its update.

    Attributes:
        weight: the weight to store.
        real: its change from the base alone stored in the same way, in the weight's shape, fp32 or better; the residual
            is included.
        how: the method in a few words, for the report.
        residual: the low-rank part beside a 4-bit weight.
        limited: whether a limit on the residual's rank left something out.
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
    """Return base + update, both of the weight's shape, summed in the update's dtype and rounded once to `dtype`."""
    wide = base.to(update.dtype)
    weight = (wide + update).to(dtype)
    return MergedWeight(weight, weight.to(update.dtype) - wide.to(dtype).to(update.dtype), how)


def merged_4bit(base: Tensor, update: Tensor, form: WeightFormat, source_dtype: torch.dtype, how: str) -> MergedWeight:
    """Return quantize(base + update), both of the weight's shape.

    From a 16-bit base this keeps even a small update: a weight near the border between two codes changes its code with
    a probability that grows with its update, so the codes follow the update on average. The weights of a dequantized
    base lie at their codes' values, where a small update changes no code.
    """
    weight = quantized(base.to(update.dtype) + update, form, source_dtype)
    before = quantized(base.to(update.dtype), form, source_dtype)
    return MergedWeight(weight, weight.dequantize(update.dtype) - before.dequantize(update.dtype), how)


def merged_4bit_with_residual(
    weight: QuantizedWeight, update: MergeUpdate, rank: int | None, dtype: torch.dtype
) -> MergedWeight:
    """Add an update to a weight that exists in 4 bits only, with a low-rank part beside the 4 bits.

    Rounding would lose a small update entirely. So the update stays beside the codes at its own rank, and the codes are
    kept, except that DoRA's gain goes into the scales. If `rank` is lower than the update's, there is a second way: new
    codes, and the best low-rank approximation of what they miss (Eckart-Young). The result nearer to the intended
    weight is returned.

    Args:
        rank: most columns of the low-rank part; None takes as many as the update has.
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
    nearer = min(kept, new, key=lambda merged: float((merged.real - update.dense).norm()))
    return replace(nearer, limited=True)


def quantized(values: Tensor, form: WeightFormat, source_dtype: torch.dtype) -> QuantizedWeight:
    """Quantize values, (rows, columns), in fp32; files record `source_dtype` as the source's dtype."""
    weight = quantize(values.float(), form.quant_type, form.block_size, form.double_quant)
    return replace(weight, dtype=source_dtype)


def quantized_like(values: Tensor, like: QuantizedWeight) -> QuantizedWeight:
    """Quantize values, (rows, columns), in the format of another weight."""
    return quantized(values, format_of(like), like.dtype)


def format_of(weight: QuantizedWeight) -> WeightFormat:
    """Return how a weight is quantized."""
    return WeightFormat(weight.quant_type, weight.block_size, weight.double_quant)


def least_rank(update: LowRank, share: float) -> int:
    """Return the least rank at which the best approximation of an update keeps a share of its squared norm."""
    energy = update.singular_values.double().square()
    kept = energy.cumsum(0) / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return min(len(energy), int((kept < share).sum()) + 1)


def _with_residual(
    codes: QuantizedWeight, base: Tensor, residual: LowRank, rank: int | None, dtype: torch.dtype, how: str
) -> MergedWeight:
    rank = residual.rank if rank is None else min(rank, residual.rank)
    stored = residual.to(torch.float64).truncated(rank).to(dtype)
    real = codes.dequantize(base.dtype) - base + stored.to(base.dtype).dense()
    return MergedWeight(codes, real, f"{how} + rank {rank}" if rank else how, stored if rank else None)


def _leading(matrix: Tensor, rank: int) -> LowRank:
    """Return nearly the best approximation of a rank, by a random projection with four power iterations."""
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)  # the same merge gives the same bytes
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=4)
    return LowRank(u[:, :rank] * s[:rank], v[:, :rank].T)
