"""Dropout without its factor, from a seed: the mask is drawn again wherever it is needed, and never kept.

Ten rounds of Philox give four words for four elements that lie 16 apart. A program thus reads and writes rows of 16,
which threads share evenly.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from ..ops.dropout import drop_threshold
from .launch import on_device_of, source

_TILE = 256  # counters per program, four elements each


def drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """See `ops.dropout.drop`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if count := x.numel():
        threshold = drop_threshold(p)
        with on_device_of(x):
            drop_kernel[(triton.cdiv(count, 4 * _TILE),)](x, y, int(seed), threshold, count, TILE=_TILE)
    return y


@triton.jit(do_not_specialize=["seed", "threshold"])
def drop_kernel(
    x: tl.tensor, y: tl.tensor, seed: tl.tensor, threshold: tl.tensor, count: tl.tensor, TILE: tl.constexpr
) -> None:  # fmt: skip
    """y = x, or 0 if the word is below the threshold."""
    counter = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    first = counter // 16 * 64 + counter % 16
    words = tl.randint4x(seed, counter)
    for word in tl.static_range(4):
        offset = first + 16 * word
        mask = offset < count
        value = tl.load(x + offset, mask=mask, other=0.0)
        is_dropped = words[word].to(tl.uint32, bitcast=True).to(tl.int64) < threshold
        tl.store(y + offset, tl.where(is_dropped, 0.0, value), mask=mask)


def sources() -> Iterator[tuple[str, ASTSource]]:
    """Yield the kernel in bf16 and in fp32."""
    for dtype in ("bf16", "fp32"):
        types = {"x": f"*{dtype}", "y": f"*{dtype}", "seed": "i64", "threshold": "i64", "count": "i32:16"}
        yield f"drop {dtype}", source(drop_kernel, types, {"TILE": _TILE})
