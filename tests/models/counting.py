"""Counting what a forward and a backward pass do: products, and bytes that wait for the backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import lorakit_kernels  # noqa: F401  registers torch.ops.lorakit
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Costs:
    """Of one pass forward and one backward.

    Attributes:
        forward, backward: FLOPs of the products of matrices; those of attention, batched products, left out.
        gradients: shapes of the gradients that the parameters got.
        saved: dtype -> elements of the distinct tensors that autograd kept, parameters and buffers left out.
    """

    forward: int = 0
    backward: int = 0
    gradients: dict[str, tuple[int, ...]] = field(default_factory=dict)
    saved: dict[torch.dtype, int] = field(default_factory=dict)

    @property
    def saved_bytes(self) -> int:
        """Bytes of what was kept."""
        return sum(count * dtype.itemsize for dtype, count in self.saved.items())


def costs(model: nn.Module, run: Callable[[], Tensor | Sequence[Tensor]]) -> Costs:
    """Run forward and backward; the gradient of every result is ones."""
    own = {t.untyped_storage().data_ptr() for of in (model.parameters(), model.buffers()) for t in of}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    result = Costs()
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = run()
        ys = [y] if isinstance(y, Tensor) else list(y)
    result.forward = _products(counter)
    for tensor in kept.values():
        count = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
        result.saved[tensor.dtype] = result.saved.get(tensor.dtype, 0) + count
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    result.backward = _products(counter)
    result.gradients = {name: tuple(p.shape) for name, p in model.named_parameters() if p.grad is not None}
    return result


def _products(counter: FlopCounterMode) -> int:
    counts = counter.get_flop_counts().get("Global", {})
    assert set(counts) <= {*FORMULAS, *ATTENTION, torch.ops.aten.mm, torch.ops.aten.addmm}
    return sum(flops for op, flops in counts.items() if op not in ATTENTION)


ATTENTION = {
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_backward,
}


# ---- products inside operations, which FlopCounterMode does not look into --------------------------------------------


def _linear_4bit(x: Sequence[int], *arguments: Any, out_shape: Any = None) -> int:
    shape, lora = arguments[4], arguments[8]
    return 2 * math.prod(x[:-1]) * (math.prod(shape) + _rank(lora) * shape[0])


def _linear_4bit_dx(dy: Sequence[int], *arguments: Any, out_shape: Any = None) -> int:
    shape, lora = arguments[4], arguments[7]
    return 2 * math.prod(dy[:-1]) * (math.prod(shape) + _rank(lora) * shape[1])


def _add_linear_4bit_dx(dx: Sequence[int], dy: Sequence[int], *arguments: Any, out_shape: Any = None) -> int:
    return 2 * math.prod(dy[:-1]) * math.prod(arguments[4])


def _addmm_in_place(y: Sequence[int], a: Sequence[int], b: Sequence[int], *_: Any, out_shape: Any = None) -> int:
    return 2 * a[0] * a[1] * b[1]


def _rank(lora: Sequence[Sequence[int]]) -> int:
    return lora[0][-1] if lora else 0


FORMULAS = {
    torch.ops.lorakit.linear_4bit: _linear_4bit,
    torch.ops.lorakit.linear_4bit_dx: _linear_4bit_dx,
    torch.ops.lorakit.add_linear_4bit_dx: _add_linear_4bit_dx,
    torch.ops.aten.addmm_: _addmm_in_place,
}


def adapted_linears(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield in and out features of each layer that has an adapter, ours or PEFT's."""
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield module.base_layer.in_features, module.base_layer.out_features
