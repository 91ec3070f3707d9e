"""Linear layers that read the same x: the tensors that they keep for the backward pass, and their products.

The counts follow `layers.lora_linear` (base and adapter as one function), `AdaptedLayer.with_updates` (the same in
single operations, for variants that need it) and `layers.saved_module`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .adapter_size import FP32
from .shape import LinearShape


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass: sequences of one length.

    Attributes:
        sequences, length: number of sequences, and tokens of each.
        trained: tokens that count in the loss.
        dtype: dtype of the products.
        dropout: whether dropout applies to the adapters' inputs.
        on_cpu: whether it runs on the CPU, which has another attention.
    """

    sequences: int
    length: int
    trained: int
    dtype: torch.dtype
    dropout: bool
    on_cpu: bool

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.sequences * self.length

    def nbytes(self, *widths: int) -> int:
        """Bytes of (tokens, width) matrices in the dtype of the products."""
        return self.tokens * sum(widths) * self.dtype.itemsize


# ---- kept tensors ----------------------------------------------------------------------------------------------------


def is_fused(group: Sequence[LinearShape], batch: MicroBatch) -> bool:
    """Return whether `linear_together` runs a group as one function, which can recompute its x."""
    return all(linear.adapter.is_fused(batch.dropout) for linear in group)


def recomputes_input(group: Sequence[LinearShape], batch: MicroBatch) -> bool:
    """Return whether a group recomputes its x, from tensors that are kept for that."""
    return is_fused(group, batch) and any(linear.trains_a for linear in group)


def saved_by_group(
    group: Sequence[LinearShape],
    batch: MicroBatch,
    x_has_gradient: bool,
    recomputes_x: bool = False,
    outputs_kept: Sequence[bool] = (),
) -> list[int]:
    """Return the bytes of each tensor that the layers of a group keep.

    Args:
        recomputes_x: whether a group that is one function recomputes x, or another operation keeps x anyway.
        outputs_kept: for each layer, whether the next operation keeps its output; default: none does.
    """
    together, tensors, keeps_x = is_fused(group, batch), list[int](), False
    for linear, is_kept in zip(group, outputs_kept or [False] * len(group), strict=True):
        if is_fused((linear,), batch):
            keeps_x = keeps_x or (linear.trains_a and not (together and recomputes_x))
            tensors += [] if together else [batch.nbytes(linear.adapter.rank)]
            tensors += _fused_gain(linear, batch, is_kept)
        elif linear.adapter.rank and linear.adapter.variant.is_dense:
            keeps_x = keeps_x or not batch.dropout
            tensors += _dense(linear, batch, x_has_gradient)
        elif linear.adapter.rank:
            keeps_x = keeps_x or (linear.trains_a and not batch.dropout)
            tensors += _unfused(linear, batch, x_has_gradient)
        elif linear.trains_weight:
            keeps_x = True
            # The copy, cast; trained rows of a tied table are written into a copy in any dtype.
            is_copied = batch.dtype.itemsize < FP32 or linear.adapter.follows_embedding == "rows"
            tensors += [linear.elements * batch.dtype.itemsize] * (x_has_gradient and is_copied)
    if together:
        tensors.append(batch.nbytes(*(linear.adapter.rank for linear in group)))  # u = x Aᵀ of all, stacked
    return tensors + [batch.nbytes(group[0].in_features)] * keeps_x


def _fused_gain(linear: LinearShape, batch: MicroBatch, output_is_kept: bool) -> list[int]:
    """Return the bytes of DoRA's norms and gains, and of the product that the gain multiplies.

    Without a bias, that product is the output itself.
    """
    if not linear.adapter.variant.has_gain:
        return []
    product = [] if output_is_kept and not linear.has_bias else [batch.nbytes(linear.out_features)]
    return [FP32 * linear.out_features] * 2 + product


def _unfused(linear: LinearShape, batch: MicroBatch, x_has_gradient: bool) -> list[int]:
    """Return the bytes of each tensor that separate operations keep; x only if dropout applies to it."""
    rank, item = linear.adapter.product_rank, batch.dtype.itemsize
    tensors = [batch.nbytes(rank)]  # u
    if batch.dropout:
        tensors += [batch.nbytes(linear.in_features)] * linear.trains_a  # x dropped out
    if item < FP32 or linear.adapter.variant.joins_matrices:  # A and B, cast, or beside those of the start
        tensors += [linear.in_features * rank * item] * x_has_gradient  # A to find the gradient of x
        tensors += [linear.out_features * rank * item] * (x_has_gradient or linear.trains_a)  # B that of u
    if linear.adapter.variant.has_gain:
        # The norms; the gain, and the gain minus one; the product and the update that they multiply.
        gains = [item * linear.out_features] * (1 + x_has_gradient)
        tensors += [FP32 * linear.out_features, *gains, *[batch.nbytes(linear.out_features)] * 2]
    return tensors


def _dense(linear: LinearShape, batch: MicroBatch, x_has_gradient: bool) -> list[int]:
    """Return the bytes that a product with a matrix of the weight's size keeps; x only if dropout applies to it."""
    rank, item = linear.adapter.rank, batch.dtype.itemsize
    tensors = [linear.elements * item] * x_has_gradient + [linear.out_features * rank * item]  # the matrix, s B
    tensors += [linear.in_features * rank * item] * (item < FP32)  # A, cast
    return tensors + [batch.nbytes(linear.in_features)] * batch.dropout


# ---- products --------------------------------------------------------------------------------------------------------


def forward_flops(group: Sequence[LinearShape], batch: MicroBatch) -> int:
    """Return the FLOPs of y = x Wᵀ over the frozen or copied weights; DoRA with dropout takes the product twice."""
    return 2 * batch.tokens * sum(linear.elements * _times(linear, batch) for linear in group)


def adapter_forward_flops(group: Sequence[LinearShape], batch: MicroBatch, passes: int) -> int:
    """Return the FLOPs of u = x Aᵀ and u Bᵀ, and of the work of each pass, such as DoRA's norms."""
    per_token = per_pass = 0
    for linear in group:
        rank, variant = linear.adapter.product_rank, linear.adapter.variant
        is_dense = variant.is_dense and rank > 0
        per_token += linear.elements if is_dense else rank * (linear.in_features + linear.out_features)
        per_pass += variant.flops(linear.adapter.rank, linear.in_features, linear.out_features)
    return 2 * batch.tokens * per_token + passes * per_pass


def adapter_backward_flops(
    group: Sequence[LinearShape], batch: MicroBatch, x_has_gradient: bool, passes: int = 1
) -> int:
    """Return the FLOPs of t = dy B, tᵀ x and dyᵀ u, of t A if x has a gradient, and of dW if a copy is trained.

    A matrix M of the weight's size takes dM = dyᵀ x, and in each pass the gradients of B and A.
    """
    per_token = per_pass = 0
    for linear in group:
        if linear.adapter.variant.is_dense and linear.adapter.rank:
            per_token += linear.elements * (1 + x_has_gradient)
            per_pass += 2 * linear.adapter.rank * linear.elements * (1 + linear.trains_a)
            continue
        takes_t = is_fused((linear,), batch) or x_has_gradient or linear.trains_a
        per_token += linear.adapter.product_rank * linear.in_features * (linear.trains_a + x_has_gradient)
        per_token += linear.adapter.product_rank * linear.out_features * (1 + takes_t)
        per_token += linear.elements * linear.trains_weight
    return 2 * batch.tokens * per_token + passes * per_pass


def _times(linear: LinearShape, batch: MicroBatch) -> int:
    """Return how often x Wᵀ is computed; DoRA's gain needs a second product, of x after dropout."""
    return 2 if batch.dropout and linear.adapter.variant.has_gain else 1
