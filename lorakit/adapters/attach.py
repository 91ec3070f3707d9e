"""Attach adapters to a model and take them off: the base is never touched."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..layers import BASE, VARIANTS, Linear4bit, LoRALinear
from .config import LoraConfig
from .inits import INITS
from .state import (
    adapter_configs,
    adapter_parts,
    check_adapter,
    check_not_in_a_row,
    forget_adapter,
    lora_layers,
    replace_module,
    state_of,
)
from .switching import disable_adapters, set_adapter, set_trained
from .targeting import MatchReport, linear_layers, match_modules, pattern_value

__all__ = [
    "adapter_configs",
    "adapter_parameters",
    "adapter_parts",
    "add_adapter",
    "check_adapter",
    "count_parameters",
    "disable_adapters",
    "lora_layers",
    "remove_adapter",
    "replace_module",
    "set_adapter",
    "set_trained",
]

_NAMESPACE = nn.ParameterDict()  # A and B are its attributes under the adapter's name


def add_adapter(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    dtype: torch.dtype = torch.float32,
    trained: bool = True,
) -> MatchReport:
    """Attach a LoRA adapter and make it the one that is active and the one that is trained.

    Layers are wrapped in place; their weights keep their bytes. Works on any model with nn.Linear or Linear4bit layers.
    The first adapter freezes the whole model; later ones leave alone what is not an adapter's.

    Args:
        dtype: of the trainable A and B.
        trained: False: frozen, and what was trained before stays so.

    Raises:
        AdapterError: the name is taken or not usable, or a target pattern matches nothing. The model is then unchanged.
    """
    if not name or "." in name or hasattr(_NAMESPACE, name) or name == BASE:
        raise AdapterError(f"'{name}' cannot name an adapter: empty, with a dot, or a word that is taken")
    if name in adapter_configs(model):
        raise AdapterError(f"the model already has an adapter '{name}'; remove it first or choose another name")
    report = MatchReport(name, match_modules(model, config))
    wanted = {path for paths in report.matched.values() for path in paths}
    # In model order, so that the random init is repeatable.
    layers = {path: layer for path, layer in linear_layers(model).items() if path in wanted}
    report.ranks = {path: pattern_value(config.rank_pattern, path, config.r) for path in layers}
    alphas = {path: pattern_value(config.alpha_pattern, path, config.lora_alpha) for path in layers}
    for path, layer in layers.items():  # from here on nothing can fail
        module = model.get_submodule(path)
        if not isinstance(module, LoRALinear):
            module = LoRALinear(layer)
            module.train(model.training)
            replace_module(model, layer, module)
        scaling = config.scaling(report.ranks[path], alphas[path])
        is_neutral = config.init_lora_weights is not False
        module.add(name, report.ranks[path], scaling, config.lora_dropout, is_neutral, dtype, VARIANTS[config.variant])
        if isinstance(config.init_lora_weights, str):
            INITS[config.init_lora_weights](module, name)
    if not adapter_configs(model):
        model.requires_grad_(False)
    adapter_configs(model)[name] = config
    set_adapter(model, name)
    set_trained(model, name if trained else state_of(model).trained)
    report.trainable = sum(parameter.numel() for parameter in adapter_parameters(model, name))
    report.total = count_parameters(model)
    return report


def remove_adapter(model: nn.Module, name: str = "default") -> None:
    """Take an adapter off; a layer that carries no other becomes the very module object it was.

    Raises:
        AdapterError: there is no adapter of that name, or `use_rows` has given it to a row.
    """
    check_adapter(model, name)
    check_not_in_a_row(model, name)
    for layer in adapter_parts(model, name).values():
        layer.remove(name)
        if not layer.names():
            replace_module(model, layer, layer.base_layer)
    forget_adapter(model, name)


def adapter_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Return the trained parameters of one adapter, or of all, in model order: A, B, and what its variant adds."""
    found: list[nn.Parameter] = []
    for layer in adapter_parts(model, name).values():
        for one in [name] if name else layer.names():
            found += layer.parameters_of(one).values()
    return found


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, each shared one once; a 4-bit weight counts as the weights it stands for."""
    count, seen = 0, set[int]()
    for module in model.modules():
        own: list[tuple[Tensor, int]] = [(p, p.numel()) for p in module.parameters(recurse=False)]
        if isinstance(module, Linear4bit):
            own = [(module.packed, math.prod(module.quantized.shape))]
            own += [(module.bias, module.bias.numel())] if module.bias is not None else []
        count += sum(size for tensor, size in own if id(tensor) not in seen)
        seen.update(id(tensor) for tensor, _ in own)
    return count
