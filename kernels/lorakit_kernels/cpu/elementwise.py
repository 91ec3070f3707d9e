"""The operations between the matrix products, in C++: RMSNorm, rotary embedding, SwiGLU, dropout and the loss.

The reference computes what C++ does not take: fp64, mixed dtypes, shapes that broadcast, empty tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..arguments import readable
from ..ops.dropout import drop_threshold
from .loading import CPU, DTYPES, library, threads


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.rms_norm.rms_norm`."""
    if not _has_rows(x, weight):
        return reference.rms_norm(x, weight, eps)
    rows, size = x.shape[:-1].numel(), x.shape[-1]
    x = readable("x", x, x.dtype, rows * size, CPU)
    wide = readable("weight", weight.float(), torch.float32, size, CPU)
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
    library().rms_norm(
        x.data_ptr(), DTYPES[x.dtype], wide.data_ptr(), eps, rows, size, y.data_ptr(), DTYPES[y.dtype],
        rstd.data_ptr(), *threads(),
    )  # fmt: skip
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """See `ops.rms_norm.rms_norm_backward`."""
    dy_fits = dy.shape == x.shape and dy.dtype == torch.promote_types(x.dtype, weight.dtype)
    if not (dy_fits and _has_rows(x, weight)):
        return reference.rms_norm_backward(dy, x, weight, rstd)
    rows, size = x.shape[:-1].numel(), x.shape[-1]
    dy, x = (readable(name, tensor, tensor.dtype, rows * size, CPU) for name, tensor in (("dy", dy), ("x", x)))
    wide = readable("weight", weight.float(), torch.float32, size, CPU)
    rstd = readable("rstd", rstd, torch.float32, rows, CPU)
    dx = torch.empty_like(x)
    library().rms_norm_backward(
        dy.data_ptr(), DTYPES[dy.dtype], x.data_ptr(), DTYPES[x.dtype], wide.data_ptr(), rstd.data_ptr(), rows, size,
        dx.data_ptr(), *threads(),
    )  # fmt: skip
    return dx


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool = False) -> tuple[Tensor, Tensor]:
    """See `ops.rope.rope`."""
    fits = all(
        x.dim() == 3
        and x.shape[0::2] == cos.shape == sin.shape
        and x.shape[2] % 2 == 0
        and x.numel() > 0
        and x.dtype == cos.dtype == sin.dtype in DTYPES
        for x in (q, k)
    )
    if not fits:
        return reference.rope(q, k, cos, sin, backward)
    cos, sin = (readable(name, table, q.dtype, table.numel(), CPU) for name, table in (("cos", cos), ("sin", sin)))
    return _rotated("q", q, cos, sin, backward), _rotated("k", k, cos, sin, backward)


def _rotated(name: str, x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    if not x.is_cpu:
        raise ValueError(f"{name} must be on the CPU, got {x.device}")
    x = x if x.stride(2) == 1 else x.contiguous()  # gradients arrive as (heads, tokens, head_dim), transposed
    out = torch.empty(x.shape, dtype=x.dtype)
    library().rope(
        x.data_ptr(), DTYPES[x.dtype], *x.shape, *x.stride()[:2], cos.data_ptr(), sin.data_ptr(), backward,
        out.data_ptr(), *threads(),
    )  # fmt: skip
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `ops.swiglu.swiglu`."""
    if not _are_alike(gate, up):
        return reference.swiglu(gate, up)
    count, dtype = gate.numel(), gate.dtype
    gate, up = readable("gate", gate, dtype, count, CPU), readable("up", up, dtype, count, CPU)
    y = torch.empty_like(gate)
    library().swiglu(gate.data_ptr(), up.data_ptr(), DTYPES[dtype], count, y.data_ptr(), *threads())
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.swiglu.swiglu_backward`."""
    if not _are_alike(dy, gate, up):
        return reference.swiglu_backward(dy, gate, up)
    count, dtype = gate.numel(), gate.dtype
    dy, gate, up = (readable(name, x, dtype, count, CPU) for name, x in (("dy", dy), ("gate", gate), ("up", up)))
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    library().swiglu_backward(
        dy.data_ptr(), gate.data_ptr(), up.data_ptr(), DTYPES[dtype], count, dgate.data_ptr(), dup.data_ptr(),
        *threads(),
    )  # fmt: skip
    return dgate, dup


def drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """See `ops.dropout.drop`."""
    count = x.numel()
    if x.dtype not in DTYPES or not count:
        return reference.drop(x, seed, p)
    x = readable("x", x, x.dtype, count, CPU)
    y = torch.empty_like(x)
    library().drop(x.data_ptr(), DTYPES[x.dtype], count, int(seed), drop_threshold(p), y.data_ptr(), *threads())
    return y


def cross_entropy(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    """See `ops.cross_entropy.cross_entropy`.

    Raises:
        IndexError: a target is outside the vocabulary.
    """
    if logits.dtype not in DTYPES or not logits.is_contiguous() or logits.dim() != 2 or not logits.numel():
        return reference.cross_entropy(logits, targets, with_gradient)
    rows, size = logits.shape
    logits, targets = (
        readable("logits", logits, logits.dtype, rows * size, CPU),
        readable("targets", targets, torch.int64, rows, CPU),
    )
    low, high = (int(end) for end in targets.aminmax())
    if low < 0 or high >= size:
        raise IndexError(f"target {low if low < 0 else high} is outside the vocabulary of {size}")
    losses = torch.empty(rows, dtype=torch.float32)
    library().cross_entropy(
        logits.data_ptr(), DTYPES[logits.dtype], rows, size, targets.data_ptr(), with_gradient, losses.data_ptr(),
        *threads(),
    )  # fmt: skip
    return losses


def _has_rows(x: Tensor, weight: Tensor) -> bool:
    """Return whether x has rows as long as the weight, and both have dtypes that C++ takes."""
    return x.numel() > 0 and x.dim() > 0 and x.shape[-1:] == weight.shape and {x.dtype, weight.dtype} <= DTYPES.keys()


def _are_alike(*tensors: Tensor) -> bool:
    first = tensors[0]
    return first.dtype in DTYPES and all(x.shape == first.shape and x.dtype == first.dtype for x in tensors)
