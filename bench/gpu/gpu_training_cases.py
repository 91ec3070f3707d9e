"""A step's other operations that `bench.gpu` measures, from RMSNorm and dropout to AdamW with 8-bit moments.

Their rivals are PyTorch's own eager operations, with autograd's backward passes. The optimizer's rivals are PyTorch's
fused one with fp32 moments and the peers' with 8-bit moments. PyTorch has no rotary embedding, so its rival is the
usual formula.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import lorakit_kernels as kernels
import torch
from lorakit_kernels import reference
from torch import Tensor
from torch.nn.functional import cross_entropy, dropout, rms_norm, silu

from bench.gpu.gpu_cases import Call, Case, Setting, close, differing
from lorakit.layers import rope_frequencies, rope_tables
from lorakit.training.optimizers import AdamW8bit

EPS = 1e-5


def cases(setting: Setting) -> Iterator[Case]:
    """Yield the operations, forward and backward."""
    yield from _rms_norm(setting)
    yield from _rope(setting)
    yield from _swiglu(setting)
    yield _drop(setting)
    yield _cross_entropy(setting)
    yield _adamw(setting)


def _rms_norm(setting: Setting) -> Iterator[Case]:
    x, dy = (setting.random(setting.rows, setting.hidden) for _ in range(2))
    weight = setting.random(setting.hidden)
    rstd = reference.rms_norm(x, weight, EPS)[1]
    wide = x.float(), weight.float()

    def check() -> float:
        found, found_rstd = kernels.rms_norm(x, weight, EPS)
        return max(close(found, reference.rms_norm(*wide, EPS)[0], units=2), close(found_rstd, rstd))

    def check_backward() -> float:
        exact = reference.rms_norm_backward(dy.float(), *wide, rstd)
        return close(kernels.rms_norm_backward(dy, x, weight, rstd), exact, units=2)

    ours = partial(kernels.rms_norm, x, weight, EPS), partial(kernels.rms_norm_backward, dy, x, weight, rstd)
    theirs = partial(rms_norm, x, (setting.hidden,), weight, EPS)
    size, moved = f"{setting.rows} x {setting.hidden}", x.nbytes
    yield _case("rms_norm", size, check, ours[0], lambda: theirs, 2 * moved)
    backward = partial(_backward, lambda x: rms_norm(x, (setting.hidden,), weight, EPS), [x], dy)
    yield _case("rms_norm_backward", size, check_backward, ours[1], backward, 3 * moved)


def _rope(setting: Setting) -> Iterator[Case]:
    heads, kv_heads, dim = setting.heads
    positions = torch.arange(setting.rows, device=setting.device)
    tables = rope_tables(rope_frequencies(dim, 500_000.0), positions, setting.dtype)
    q, k = setting.random(setting.rows, heads, dim), setting.random(setting.rows, kv_heads, dim)
    size = f"{setting.rows} x ({heads} + {kv_heads}) x {dim}"
    for name, backward in (("rope", False), ("rope_backward", True)):

        def check(backward: bool = backward) -> float:
            found = kernels.rope(q, k, *tables, backward)
            exact = reference.rope(*(x.float() for x in (q, k, *tables)), backward)
            return max(map(close, found, exact))

        ours = partial(kernels.rope, q, k, *tables, backward)
        theirs = partial(partial, reference.rope, q, k, *tables, backward)
        yield _case(name, size, check, ours, theirs, 2 * (q.nbytes + k.nbytes) + tables[0].nbytes)


def _swiglu(setting: Setting) -> Iterator[Case]:
    gate, up, dy = (setting.random(setting.rows, setting.width) for _ in range(3))
    wide = gate.float(), up.float()

    def check() -> float:
        return close(kernels.swiglu(gate, up), reference.swiglu(*wide))

    def check_backward() -> float:
        found, exact = kernels.swiglu_backward(dy, gate, up), reference.swiglu_backward(dy.float(), *wide)
        return max(map(close, found, exact))

    size, moved = f"{setting.rows} x {setting.width}", gate.nbytes
    yield _case("swiglu", size, check, partial(kernels.swiglu, gate, up), lambda: lambda: silu(gate) * up, 3 * moved)
    backward = partial(_backward, lambda gate, up: silu(gate) * up, [gate, up], dy)
    ours = partial(kernels.swiglu_backward, dy, gate, up)
    yield _case("swiglu_backward", size, check_backward, ours, backward, 5 * moved)


def _drop(setting: Setting) -> Case:
    x, seed = setting.random(setting.rows, setting.hidden), torch.tensor(5)

    def check() -> float:
        return differing(kernels.drop(x, seed, 0.05), reference.drop(x, seed, 0.05))

    rivals = {"lorakit": lambda: partial(kernels.drop, x, seed, 0.05), "PyTorch": lambda: partial(dropout, x, 0.05)}
    return Case("drop", f"{setting.rows} x {setting.hidden}", check, True, rivals, 2 * x.nbytes)


def _cross_entropy(setting: Setting) -> Case:
    """Return the case of the loss and its gradient; a call overwrites the logits, which does not change later times."""
    rows = min(setting.rows, 2048)
    logits = setting.random(rows, setting.vocabulary)
    targets = torch.randint(setting.vocabulary, (rows,), device=setting.device)

    def check() -> float:
        found, exact = logits.clone(), logits.float()
        losses, expected = (
            kernels.cross_entropy(found, targets, True), reference.cross_entropy(exact, targets, True),
        )  # fmt: skip
        return max(close(losses, expected), close(found, exact, floor=1e-7))  # probabilities are small

    def pytorch() -> Call:
        leaf = logits.clone().requires_grad_()

        def run() -> None:
            leaf.grad = None
            cross_entropy(leaf.float(), targets, reduction="sum").backward()

        return run

    ours = partial(kernels.cross_entropy, logits, targets, True)
    size = f"{rows} x {setting.vocabulary}"
    return _case("cross_entropy with gradient", size, check, ours, pytorch, 2 * logits.nbytes)


def _adamw(setting: Setting) -> Case:
    start = torch.randn(setting.parameters, device=setting.device)
    gradients = [torch.randn_like(start) for _ in range(3)]

    def check() -> float:
        found = _steps(start, gradients)
        with kernels.use_backend("reference"):
            expected = _steps(start.cpu(), [gradient.cpu() for gradient in gradients])
        return sum(map(differing, found, expected))

    def stepping(optimizer: Callable[..., Any], **options: object) -> Call:
        parameter = start.clone().requires_grad_()
        parameter.grad = gradients[0]
        step: Call = optimizer([parameter], lr=1e-4, **options).step
        return step

    rivals = {
        "lorakit": partial(stepping, AdamW8bit), "PyTorch": partial(stepping, torch.optim.AdamW, fused=True),
        "bitsandbytes": lambda: stepping(importlib.import_module("bitsandbytes.optim").AdamW8bit),
        "torchao": lambda: stepping(importlib.import_module("torchao.optim").AdamW8bit),
    }  # fmt: skip
    # fp32 parameter, gradient and new parameter; two codes, read and written
    return Case("adamw_8bit", f"{setting.parameters} in fp32", check, True, rivals, setting.parameters * 16)


def _steps(start: Tensor, gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return a parameter and its 8-bit state after one step for each gradient."""
    parameter = start.clone().requires_grad_()
    optimizer = AdamW8bit([parameter], lr=1e-3)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    return [parameter.detach(), *(value for key, value in optimizer.state[parameter].items() if key != "step")]


def _backward(forward: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> Call:
    """Return a call of the backward pass alone."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = forward(*leaves)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _case(
    operation: str, size: str, check: Callable[[], float], ours: Call, pytorch: Callable[[], Call], moved: float
) -> Case:
    return Case(operation, size, check, False, {"lorakit": lambda: ours, "PyTorch": pytorch}, moved)
