"""Activation checkpointing: the backward pass recomputes a part of the model instead of keeping its activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...layers import AdaptersInUse


def recomputed(function: Callable[..., Tensor], module: nn.Module, x: Tensor, *rest: Any) -> Tensor:
    """Return function(x, *rest), keeping only x (Chen et al. 2016, arXiv:1604.06174, section 3).

    torch.utils.checkpoint does the same, but imports the compiler for it: 142 MiB and 2 s.

    Args:
        function: depends on `module`'s trainable parameters, x and the rest. The backward pass runs it again with the
            same random numbers and the same adapters in use, whatever was switched since.
        x: of any shape, as is the result.
        rest: arguments without gradient.
    """
    if not torch.is_grad_enabled():
        return function(x, *rest)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    result: Tensor = _Recomputed.apply(function, rest, AdaptersInUse(module), x, *parameters)
    return result


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Tensor],
        rest: tuple[Any, ...],
        in_use: AdaptersInUse,
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.function, ctx.rest, ctx.in_use = function, rest, in_use
        ctx.random = torch.get_rng_state(), _device_random(x)
        ctx.save_for_backward(x, *parameters)
        return function(x, *rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[3])
        devices = [] if x.device.type == "cpu" else [x.device]
        with torch.enable_grad(), torch.random.fork_rng(devices, device_type=x.device.type if devices else "cuda"):
            torch.set_rng_state(ctx.random[0])
            if devices:
                torch.get_device_module(x.device).set_rng_state(ctx.random[1], x.device)
            with ctx.in_use.restored():
                y = ctx.function(x, *ctx.rest)
        wanted = [tensor for tensor in (x, *parameters) if tensor.requires_grad]
        gradients = iter(torch.autograd.grad(y, wanted, grads, allow_unused=True))
        return None, None, None, *(next(gradients) if tensor.requires_grad else None for tensor in (x, *parameters))


def _device_random(x: Tensor) -> Tensor | None:
    if x.device.type == "cpu":
        return None
    state: Tensor = torch.get_device_module(x.device).get_rng_state(x.device)
    return state
