"""What the kernels of this package need around them: launching on a tensor's device, and sources to compile offline."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the device of x the current one, which is where Triton launches; the CPU, in the interpreter, needs none."""
    if x.device.type == "cpu":
        return contextlib.nullcontext()
    device: contextlib.AbstractContextManager[Any] = torch.get_device_module(x.device).device(x.device)
    return device


def source(kernel: triton.JITFunction, types: Mapping[str, str], constants: Mapping[str, Any]) -> ASTSource:
    """Return a kernel specialized as a launch would, for triton.compile.

    Args:
        types: by argument: "*bf16" (aligned to 16 bytes), "fp32", "i32", or "i32:16" for a multiple of 16.
        constants: values of the arguments that are tl.constexpr.
    """
    signature = {name: types[name].partition(":")[0] if name in types else "constexpr" for name in kernel.arg_names}
    aligned = [name for name, kind in types.items() if kind.startswith("*") or kind.endswith(":16")]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(kernel, signature, constexprs=dict(constants), attrs=attributes)
