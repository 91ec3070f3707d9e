"""Dropout (Srivastava et al. 2014) without its factor: y = m(seed)∘x, hence dx = m(seed)∘dy.

The seed and an element's position decide whether it is dropped, bit for bit on every device. The backward pass needs
only the seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import differentiate, operation

GROUP = 64  # elements that share 16 counters of four words


def _empty_dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape)


@operation(fake=_empty_dropped)
def drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Return x with each element set to zero with probability p, to within 2^-32.

    Element i is dropped if its word of Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405) with the key
    `seed` is below p·2^32: word (i / 16) mod 4 of counter 16·(i / 64) + i mod 16.

    Args:
        x: any shape; elements are counted row-major.
        seed: () int64, on the CPU.
        p: from 0 to below 1.

    Raises:
        ValueError: p is outside that range.
    """
    threshold = drop_threshold(p)
    groups = -(-x.numel() // GROUP)
    counters = torch.arange(GROUP // 4 * groups, device=x.device)
    zero = torch.zeros_like(counters)
    words = philox(torch.stack([counters & 2**32 - 1, counters >> 32, zero, zero]), int(seed))
    word = words.view(4, groups, GROUP // 4).transpose(0, 1).reshape(-1)[: x.numel()].view(x.shape)
    return x.masked_fill(word < threshold, 0)


def drop_threshold(p: float) -> int:
    """Return p·2^32, rounded, and at most 2^32 − 1, which a word can hold. Words below it drop their elements."""
    if not 0 <= p < 1:
        raise ValueError(f"the probability of dropping must be from 0 to below 1, got {p}")
    return min(round(p * 2**32), 2**32 - 1)


def philox(counters: Tensor, key: int) -> Tensor:
    """Return the four 32-bit words of Philox4x32-10 for each counter, (4, ...) int64 in 0 .. 2^32 − 1.

    Args:
        counters: (4, ...) int64 in 0 .. 2^32 − 1, the 32-bit words of each counter, the lowest first.
        key: 64 bits.
    """
    low = 2**32 - 1
    a, b, c, d = counters
    first, second = key & low, key >> 32 & low
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57  # the bits of unsigned 64-bit products; int64 wraps around
        a, b = (right >> 32 & low) ^ b ^ first, right & low
        c, d = (left >> 32 & low) ^ d ^ second, left & low
        first, second = first + 0x9E3779B9 & low, second + 0xBB67AE85 & low
    return torch.stack([a, b, c, d])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return drop(dy, ctx.saved_tensors[0], ctx.p), None, None


differentiate(drop, _backward, _save)
