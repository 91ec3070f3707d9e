"""Rotary embedding of queries and keys in one launch, forward and backward.

A program takes one token. It reads the token's row of the tables once for all heads and rotates every pair. The tables
have one row per token and thus hold the positions, so packed sequences need nothing more. The kernel computes in fp32
and rounds once at the end; the definition rounds both products too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from .launch import on_device_of, source


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool = False) -> tuple[Tensor, Tensor]:
    """See `ops.rope.rope`.

    Raises:
        ValueError: q, k and the tables differ in tokens or dimensions.
    """
    tokens, heads, dim = q.shape
    if (k.shape[0], k.shape[2]) != (tokens, dim) or cos.shape != (tokens, dim) or sin.shape != cos.shape or dim % 2:
        raise ValueError(
            "q and k must be (tokens, heads, head_dim), cos and sin (tokens, head_dim); got "
            f"{', '.join(str(tuple(x.shape)) for x in (q, k, cos, sin))}"
        )
    q, k, cos, sin = (x.contiguous() for x in (q, k, cos, sin))
    turned_q, turned_k = torch.empty_like(q), torch.empty_like(k)
    kv_heads, half = k.shape[1], dim // 2
    if tokens:
        sizes = (heads, kv_heads, half)
        with on_device_of(q):
            rope_kernel[(tokens,)](q, k, cos, sin, turned_q, turned_k, *sizes, BACKWARD=backward, **_tile(*sizes))
    return turned_q, turned_k


def _tile(heads: int, kv_heads: int, half: int) -> dict[str, int]:
    sizes = (triton.next_power_of_2(size) for size in (heads, kv_heads, half))
    return dict(zip(("HEADS", "KV_HEADS", "HALF"), sizes, strict=True))


@triton.jit
def rope_kernel(
    q: tl.tensor, k: tl.tensor, cos: tl.tensor, sin: tl.tensor, turned_q: tl.tensor, turned_k: tl.tensor,
    heads: tl.tensor, kv_heads: tl.tensor, half: tl.tensor,
    BACKWARD: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
) -> None:  # fmt: skip
    """Rotate all heads of a token; HEADS, KV_HEADS and HALF are the next powers of 2."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)
    table = token * 2 * half + pair
    c = tl.load(cos + table, mask=pair < half, other=0.0).to(tl.float32)
    s = tl.load(sin + table, mask=pair < half, other=0.0).to(tl.float32)
    if BACKWARD:
        s = -s
    _rotate(q, turned_q, token * heads * 2 * half, heads, half, c, s, HEADS, HALF)
    _rotate(k, turned_k, token * kv_heads * 2 * half, kv_heads, half, c, s, KV_HEADS, HALF)


@triton.jit
def _rotate(
    x: tl.tensor, y: tl.tensor, start: tl.tensor, heads: tl.tensor, half: tl.tensor, c: tl.tensor, s: tl.tensor,
    HEADS: tl.constexpr, HALF: tl.constexpr,
) -> None:  # fmt: skip
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    first = start + head * 2 * half + pair
    mask = (head < heads) & (pair < half)
    a = tl.load(x + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + first + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + first, a * c - b * s, mask=mask)
    tl.store(y + first + half, b * c + a * s, mask=mask)


def sources() -> Iterator[tuple[str, ASTSource]]:
    """Yield kernels for 32 query heads and 8 key heads of 128 dimensions, in bf16."""
    pointers = dict.fromkeys(("q", "k", "cos", "sin", "turned_q", "turned_k"), "*bf16")
    sizes = {"heads": "i32:16", "kv_heads": "i32", "half": "i32:16"}
    for name, backward in (("rope", False), ("rope_backward", True)):
        yield name, source(rope_kernel, pointers | sizes, {"BACKWARD": backward, **_tile(32, 8, 64)})
