"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34).

Its gradient is the rotation by the opposite angle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import differentiate, operation


def _empty_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@operation(fake=_empty_rope)
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate each pair (i, i + head_dim / 2) of q and k by its token's angle.

    Args:
        q: (tokens, heads, head_dim).
        k: (tokens, kv_heads, head_dim).
        cos, sin: (tokens, head_dim); the second half of each row repeats the first. Each token has its own row, so
            positions may restart anywhere, as they do in a packed batch.
        backward: rotate by −angle, which is the inverse and the map that gradients go through.

    Returns:
        The rotated q and k, of the same shapes and dtypes.
    """
    sin = -sin if backward else sin
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    quarter_turn = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos[:, None] + quarter_turn * sin[:, None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    _, _, cos, sin, ctx.backward = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return *rope(dq, dk, cos, sin, not ctx.backward), None, None, None


differentiate(rope, _backward, _save)
