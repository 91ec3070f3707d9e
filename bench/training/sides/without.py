"""The tricks that make lorakit's training step fast and lean, and how to remove each, for `bench.tricks`.

Every entry replaces one trick with the plain way, in the process that asks for it. Results stay the same except for
rounding. A name that no longer exists is an error. Otherwise nothing would be removed, and the difference would be
noise.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from lorakit_kernels import cpu
from torch import nn

from lorakit.layers import lora_linear
from lorakit.models.decoder import attention, blocks
from lorakit.training import optimizers


def _replace(module: ModuleType, name: str, value: object) -> None:
    if not hasattr(module, name):
        raise AttributeError(f"{module.__name__} has no {name} to take out")
    setattr(module, name, value)


def _whole_attention() -> None:
    _replace(attention, "QUERY_BLOCK", 1 << 30)


def _keep_outputs_of_norms_and_swiglu() -> None:
    together = lora_linear.linear_together
    _replace(blocks, "linear_together", lambda x, *layers, recompute=None: together(x, *layers))


def _layers_one_by_one() -> None:
    def one_by_one(x: torch.Tensor, *layers: nn.Module, recompute: Any = None) -> tuple[torch.Tensor, ...]:
        return tuple(lora_linear.linear_together(x, layer, recompute=recompute)[0] for layer in layers)

    _replace(blocks, "linear_together", one_by_one)


def _pytorch_between_the_products() -> None:
    for name in ("rms_norm", "rms_norm_backward", "rope", "swiglu", "swiglu_backward", "drop", "cross_entropy"):
        _replace(cpu, name, None)


def _torch_adamw() -> None:
    class TorchAdamW(torch.optim.AdamW):
        settings = optimizers.AdamW.settings

    optimizers.OPTIMIZERS["adamw"] = TorchAdamW  # type: ignore[assignment]


WITHOUT: dict[str, Callable[[], None]] = {
    "attention in blocks of queries": _whole_attention,
    "computing again what norms and SwiGLU gave": _keep_outputs_of_norms_and_swiglu,
    "q, k, v and gate, up together": _layers_one_by_one,
    "C++ between the products": _pytorch_between_the_products,
    "AdamW without the compiler": _torch_adamw,
}
