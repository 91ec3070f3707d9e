"""Activation checkpointing: the backward pass recomputes a part of the model instead of keeping its activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lorakit_kernels import is_transformed
from torch import Tensor, nn
from torch.func import functional_call

from ...errors import GradientError
from ...layers import AdaptersInUse

_NO_DROPOUT = (
    "within a transform of torch.func, the backward pass cannot draw again what a recomputed part of the model has "
    "dropped; switch off dropout or activation checkpointing"
)


def recomputed(function: Callable[..., Tensor], module: nn.Module, x: Tensor, *rest: Any) -> Tensor:
    """Return function(x, *rest), keeping only x (Chen et al. 2016, arXiv:1604.06174, section 3).

    torch.utils.checkpoint does the same, but imports the compiler for it: 142 MiB and 2 s.

    Args:
        function: depends on `module`'s trainable parameters, x and the rest. The backward pass runs it again with the
            same random numbers and the same adapters in use, whatever was switched since.
        x: of any shape, as is the result.
        rest: arguments without gradient.
    """
    if not torch.is_grad_enabled() or is_transformed():
        return function(x, *rest)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    part = _Part(function, rest, module, tuple(trained), AdaptersInUse(module))
    result: Tensor = _Recomputed.apply(part, x, *trained.values())
    return result


class _Part(NamedTuple):
    """A part of the model: function(x, *rest), with the names of `module`'s trained parameters."""

    function: Callable[..., Tensor]
    rest: tuple[Any, ...]
    module: nn.Module
    trained: tuple[str, ...]
    in_use: AdaptersInUse


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: _Part, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.part = part
        ctx.random = _random_states(x)
        ctx.save_for_backward(x, *parameters)
        return part.function(x, *part.rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        creates_graph, in_transform = torch.is_grad_enabled(), is_transformed()
        devices = [] if x.device.type == "cpu" else [x.device]
        with torch.enable_grad(), torch.random.fork_rng(devices, device_type=x.device.type if devices else "cuda"):
            torch.set_rng_state(ctx.random[0])
            if devices:
                torch.get_device_module(x.device).set_rng_state(ctx.random[1], x.device)
            with ctx.part.in_use.restored():
                if creates_graph or in_transform:  # aliases, since x may depend on the same parameters
                    x, *parameters = (tensor.view_as(tensor) for tensor in (x, *parameters))
                    y = _with_parameters(ctx.part, x, parameters)
                else:
                    x = x.detach().requires_grad_(ctx.needs_input_grad[1])
                    y = ctx.part.function(x, *ctx.part.rest)
            if in_transform and not all(map(torch.equal, _random_states(x), ctx.random)):
                raise GradientError(_NO_DROPOUT)
        wanted = [tensor for tensor in (x, *parameters) if tensor.requires_grad]
        gradients = iter(torch.autograd.grad(y, wanted, grads, allow_unused=True, create_graph=creates_graph))
        return None, *(next(gradients) if tensor.requires_grad else None for tensor in (x, *parameters))


def _with_parameters(part: _Part, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the part's result for x, of any shape, with these tensors in place of the trained parameters."""
    names = (f"module.{name}" for name in part.trained)
    result: Tensor = functional_call(_Caller(part), dict(zip(names, parameters, strict=True)), (x,))
    return result


class _Caller(nn.Module):
    """A module that calls the function of a part, for `functional_call`."""

    def __init__(self, part: _Part) -> None:
        super().__init__()
        self.part, self.module = part, part.module

    def forward(self, x: Tensor) -> Tensor:
        return self.part.function(x, *self.part.rest)


def _random_states(x: Tensor) -> list[Tensor]:
    """Return the states of the generators that draw for x: the CPU's and, on another device, that device's."""
    states = [torch.get_rng_state()]
    if x.device.type != "cpu":
        states.append(torch.get_device_module(x.device).get_rng_state(x.device))
    return states
