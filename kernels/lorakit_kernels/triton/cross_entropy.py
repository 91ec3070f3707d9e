"""The losses of a chunk of logits. The gradient overwrites the logits.

A program takes a row. Its first pass keeps a separate running maximum and running sum of exponentials in every lane
(Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3), so threads meet once per row. The second pass writes the
gradient over the logits. The row moves three times, and no second matrix is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from .launch import on_device_of, source

_TILE = 4096  # most logits of a row at a time


def cross_entropy(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    """See `ops.cross_entropy.cross_entropy`.

    Raises:
        ValueError: the logits are not a contiguous matrix, or the number of targets is not the number of rows.
    """
    if logits.dim() != 2 or not logits.is_contiguous() or targets.shape != logits.shape[:1]:
        raise ValueError(
            "logits must be (rows, vocabulary), contiguous, and targets (rows,); "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    rows, vocabulary = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    if rows:
        tile = min(_TILE, triton.next_power_of_2(vocabulary))
        with on_device_of(logits):
            cross_entropy_kernel[(rows,)](
                logits, targets.contiguous(), losses, vocabulary, WITH_GRADIENT=with_gradient, TILE=tile, num_warps=8
            )
    return losses


@triton.jit
def cross_entropy_kernel(
    logits: tl.tensor, targets: tl.tensor, losses: tl.tensor, vocabulary: tl.tensor,
    WITH_GRADIENT: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """loss = log Σ exp(x) − x[target]; x becomes softmax(x) − onehot(target)."""
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * vocabulary
    target = tl.load(targets + row)
    target_logit = tl.load(x + target).to(tl.float32)
    column = tl.arange(0, TILE)
    maximum = tl.full([TILE], -3.4e38, tl.float32)  # not -inf: -inf - -inf is nan
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, vocabulary, TILE):
        mask = start + column < vocabulary
        values = tl.load(x + start + column, mask=mask, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(maximum, values)
        total = total * tl.exp(maximum - larger) + tl.exp(values - larger)
        maximum = larger
    row_maximum = tl.max(maximum, axis=0)
    normalizer = tl.sum(total * tl.exp(maximum - row_maximum), axis=0)
    tl.store(losses + row, tl.log(normalizer) + row_maximum - target_logit)
    if WITH_GRADIENT:
        for start in range(0, vocabulary, TILE):
            mask = start + column < vocabulary
            values = tl.load(x + start + column, mask=mask, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(values - row_maximum) / normalizer - tl.where(start + column == target, 1.0, 0.0)
            tl.store(x + start + column, gradient, mask=mask)


def sources() -> Iterator[tuple[str, ASTSource]]:
    """Yield the kernel without and with the gradient, in bf16."""
    types = {"logits": "*bf16", "targets": "*i64", "losses": "*fp32", "vocabulary": "i32:16"}
    for name, with_gradient in (("cross_entropy", False), ("cross_entropy with gradient", True)):
        yield name, source(cross_entropy_kernel, types, {"WITH_GRADIENT": with_gradient, "TILE": _TILE})
