"""Attach adapters to a model, switch between them, and take them off: the base is never touched."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import AdapterError, did_you_mean
from ..layers import VARIANTS, AdaptedLayer, AdapterPart, Linear4bit, LoRALinear
from .config import LoraConfig
from .inits import INITS
from .targeting import MatchReport, linear_layers, match_modules, pattern_value

_NAMESPACE = nn.ParameterDict()  # A and B are its attributes under the adapter's name


def add_adapter(
    model: nn.Module, config: LoraConfig, name: str = "default", dtype: torch.dtype = torch.float32
) -> MatchReport:
    """Attach a LoRA adapter, make it the active one and freeze everything else.

    Layers are wrapped in place; their weights keep their bytes. Works on any model with nn.Linear or Linear4bit layers.

    Args:
        dtype: of the trainable A and B.

    Raises:
        AdapterError: the name is taken or not usable, or a target pattern matches nothing. The model is then unchanged.
    """
    if not name or "." in name or hasattr(_NAMESPACE, name):
        raise AdapterError(f"'{name}' cannot name an adapter: empty, with a dot, or a word that torch's modules use")
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
            _replace(model, layer, module)
        scaling = config.scaling(report.ranks[path], alphas[path])
        is_neutral = config.init_lora_weights is not False
        module.add(name, report.ranks[path], scaling, config.lora_dropout, is_neutral, dtype, VARIANTS[config.variant])
        if isinstance(config.init_lora_weights, str):
            INITS[config.init_lora_weights](module, name)
    adapter_configs(model)[name] = config
    set_adapter(model, name)
    report.trainable = sum(parameter.numel() for parameter in adapter_parameters(model, name))
    report.total = count_parameters(model)
    return report


def adapter_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """Return the model's adapters, name -> config; the dict lives on the model."""
    if not hasattr(model, "lora_configs"):
        model.lora_configs = {}  # type: ignore[assignment]
    configs: dict[str, LoraConfig] = model.lora_configs  # type: ignore[assignment]
    return configs


def adapter_parts(model: nn.Module, name: str | None = None) -> dict[str, AdapterPart]:
    """Return every module that stands in for another, path -> module: all, or those that carry adapter `name`."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, AdapterPart) and (name is None or name in module.names())
    }


def lora_layers(model: nn.Module, name: str | None = None) -> dict[str, AdaptedLayer]:
    """Return the layers with low-rank updates, path -> layer: all of them, or those that carry adapter `name`."""
    return {path: part for path, part in adapter_parts(model, name).items() if isinstance(part, AdaptedLayer)}


def set_adapter(model: nn.Module, name: str | Sequence[str]) -> None:
    """Make one adapter, or the sum of several, active; only active adapters are trained.

    Raises:
        AdapterError: there is no adapter of that name.
    """
    names = (name,) if isinstance(name, str) else tuple(dict.fromkeys(name))
    for one in names:
        check_adapter(model, one)
    model.requires_grad_(False)
    for layer in adapter_parts(model).values():
        layer.active = tuple(one for one in names if one in layer.names())
        for one in layer.active:
            for parameter in layer.parameters_of(one).values():
                parameter.requires_grad_(True)


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model computes as if no adapter were attached."""
    layers = list(adapter_parts(model).values())
    active = [layer.active for layer in layers]
    for layer in layers:
        layer.active = ()
    try:
        yield model
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer.active = tuple(name for name in names if name in layer.names())  # one may be gone by now


def remove_adapter(model: nn.Module, name: str = "default") -> None:
    """Take an adapter off; a layer that carries no other becomes the very module object it was.

    Raises:
        AdapterError: there is no adapter of that name.
    """
    check_adapter(model, name)
    for layer in adapter_parts(model, name).values():
        layer.remove(name)
        if not layer.names():
            _replace(model, layer, layer.base_layer)
    del adapter_configs(model)[name]


def adapter_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Return the trained parameters of one adapter, or of all, in model order: A, B, and what its variant adds."""
    found: list[nn.Parameter] = []
    for layer in adapter_parts(model, name).values():
        for one in [name] if name else layer.names():
            found += layer.parameters_of(one).values()
    return found


def check_adapter(model: nn.Module, name: str) -> None:
    """Raise AdapterError, naming the nearest, unless the model has adapter `name`."""
    names = adapter_configs(model)
    if name not in names:
        known = ", ".join(names) or "none"
        raise AdapterError(f"the model has no adapter '{name}'{did_you_mean(name, names)} (attached: {known})")


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model holds `old`: a layer may be shared by several parents."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old and parent is not new:
                setattr(parent, key, new)


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
