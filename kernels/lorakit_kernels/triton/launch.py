"""Launching kernels on a tensor's device, and their sources for compiling offline."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Within the context, make the device of x the current one: Triton launches there. x may have any shape and dtype.

    A tensor on the CPU, as in Triton's interpreter, needs no current device.
    """
    if x.device.type == "cpu":
        return contextlib.nullcontext()
    device: contextlib.AbstractContextManager[Any] = torch.get_device_module(x.device).device(x.device)
    return device


def source(kernel: triton.JITFunction, types: Mapping[str, str], constants: Mapping[str, Any]) -> ASTSource:
    """Return a kernel for triton.compile, specialized as a launch would specialize it.

    Args:
        types: argument -> type: "*bf16" (aligned to 16 bytes), "fp32", "i32", or "i32:16" for a multiple of 16.
        constants: argument -> value, for the tl.constexpr arguments.
    """
    signature = {name: types[name].partition(":")[0] if name in types else "constexpr" for name in kernel.arg_names}
    aligned = [name for name, kind in types.items() if kind.startswith("*") or kind.endswith(":16")]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(kernel, signature, constexprs=dict(constants), attrs=attributes)
