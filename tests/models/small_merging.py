"""What the tests of merging share: small layers, adapters of a given size, all that a merge must leave as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorakit import Linear4bit, LoraConfig, add_adapter
from lorakit.adapters import adapter_configs, adapter_modules, lora_layers

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, 5, 99, 17, 3, 250]])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def mlp(four_bit: bool = False, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two linear layers, the first in 4 bits if asked for."""
    torch.manual_seed(0)
    first, second = nn.Linear(64, 48), nn.Linear(48, 32, bias=False)
    model = nn.Sequential(first, nn.ReLU(), second).to(dtype)
    if four_bit:
        model[0] = Linear4bit.from_linear(first)
    return model.requires_grad_(False)


def adapt(model: nn.Module, name: str = "default", size: float = 0.3, **settings: Any) -> None:
    """Attach a random adapter whose update of every layer has `size` times the norm of its weight."""
    torch.manual_seed(sum(map(ord, name)))
    add_adapter(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **settings), name)
    for layer in lora_layers(model, name).values():
        update = layer.scaling[name] * layer.lora_B[name].flatten(1) @ layer.lora_A[name].flatten(1)
        layer.lora_B[name].data *= size * layer.base_weight(torch.float32).norm() / update.norm()
        for magnitude in (p for key, p in layer.parameters_of(name).items() if "magnitude" in key):
            magnitude.data *= 1 + 0.1 * torch.randn_like(magnitude)


def full_snapshot(model: nn.Module) -> tuple[dict[str, int], dict[str, bytes], set[str], list[bool], list[set[str]]]:
    """Objects, bytes, adapters and their states: what a failed call, or a merge and its reversal, leaves as it was."""
    modules = {
        path: id(module)
        for path, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, nn.ParameterDict)  # a layer makes one when it needs it
    }
    tensors = dict(sorted((*model.named_parameters(), *model.named_buffers())))
    modules |= {name: id(tensor) for name, tensor in tensors.items()}
    raw = {name: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}
    active = [set(layer.active) for layer in adapter_modules(model).values()]
    return modules, raw, set(adapter_configs(model)), [t.requires_grad for t in tensors.values()], active
