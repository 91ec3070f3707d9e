"""What a call of a frozen layer does: the product with its weight alone, or something that only a call can do.

A fused function multiplies by the weight itself. That is the layer's output only if the layer's class is one of those
below, not a subclass of one, and nothing is hooked into the call. Any other layer is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as calling

from .embedding4bit import Embedding4bit
from .linear4bit import Linear4bit, is_conv1d
from .residual4bit import ResidualLinear4bit
from .updated_weight import UpdatedWeight

_CLASSES = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Linear4bit, ResidualLinear4bit, Embedding4bit)
_FORWARDS: dict[type, Callable[..., Any]] = {kind: kind.forward for kind in _CLASSES}  # somebody may patch a class
_PLAIN_FORWARDS = frozenset(_FORWARDS.values())
PLAIN_TENSORS = (nn.Parameter, Tensor)  # their numbers are all that they are; no subclass computes in its own way


def is_known_class(module: nn.Module) -> bool:
    """Return whether a layer's class, with its own forward, is one whose product lorakit knows."""
    kind = type(module)
    return kind.forward is _FORWARDS.get(kind) or is_conv1d(module)


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a layer is of a subclass whose forward differs from that of the class that lorakit knows."""
    return type(module).forward not in _PLAIN_FORWARDS and not is_conv1d(module)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a call of a module does more than its class's forward: hooks, or a forward of this one object."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or (calling._global_forward_hooks and _any_acts(calling._global_forward_hooks))
        or (calling._global_forward_pre_hooks and _any_acts(calling._global_forward_pre_hooks))
        or calling._global_backward_hooks
        or calling._global_backward_pre_hooks
    )


def _any_acts(hooks: Mapping[int, Callable[..., Any]]) -> bool:
    """Return whether a global hook is another than those with which PyTorch counts FLOPs, which only note names."""
    return any(getattr(hook, "__module__", "") != "torch.utils.module_tracker" for hook in hooks.values())


def is_dense(weight: object) -> bool:
    """Return whether a parameter's numbers are its values; the codes of a quantized weight are not."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return False
    return getattr(weight, "quant_state", None) is None  # bitsandbytes may keep codes in a float dtype


# ---- parameters that accelerate keeps elsewhere ----------------------------------------------------------------------


def is_elsewhere(module: nn.Module) -> bool:
    """Return whether accelerate keeps a module's own parameters on disk or in host memory until it is called."""
    return "_hf_hook" in module.__dict__ and any(one is not None and one.is_meta for one in module._parameters.values())


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Within the context a module has its parameters, although nobody calls it, even if accelerate keeps them."""
    if not is_elsewhere(module):
        yield
        return
    hook = module.__dict__["_hf_hook"]
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def present(module: nn.Module, name: str) -> Tensor:
    """Return a parameter of any shape, even if accelerate keeps it elsewhere or an updated weight is in its place."""
    parameter = cast(Tensor, getattr(module, name))
    if type(parameter) is UpdatedWeight:
        return parameter.base
    if parameter.is_meta:
        with loaded(module):
            return cast(Tensor, getattr(module, name))
    return parameter


# ---- trying a layer out ----------------------------------------------------------------------------------------------


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Within the context a module is in evaluation mode; afterwards each part has its own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@torch.no_grad()
def change_of_output(module: nn.Module, change: Tensor, x: Tensor) -> Tensor | None:
    """Return how a layer's output for x changes with its weight, in fp32; None if that cannot be tried.

    Args:
        change: of the weight, in its shape.
        x: an input of the layer, made up for this.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    own = {key: tensor.float() if is_dense(tensor) else tensor.clone() for key, tensor in tensors.items()}
    outputs = []
    try:
        with _evaluated(module), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            for weight in (own["weight"], own["weight"] + change):
                torch.manual_seed(0)
                state = {key: tensor.clone() for key, tensor in own.items()} | {"weight": weight}
                outputs.append(torch.func.functional_call(module, state, (x,)))
        before, after = outputs
        difference: Tensor = after - before
    except Exception:  # a class that nobody knows may raise anything, for an input that it never gets otherwise
        return None
    return difference
