"""Attach adapters to a model, switch between them, and take them off: the base is never touched."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import AdapterError, did_you_mean
from ..layers import AdaptedLayer, AdapterPart
from ..layers.quantized_module import QuantizedModule
from .config import LoraConfig
from .inits import find_init
from .placing import place
from .targeting import MatchReport

_NAMESPACE = nn.ParameterDict()  # A and B are its attributes under the adapter's name


def add_adapter(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    dtype: torch.dtype = torch.float32,
    losses: Iterable[Tensor] | None = None,
    sources: Mapping[str, Tensor] | None = None,
    is_strict: bool = True,
) -> MatchReport:
    """Attach a LoRA adapter, make it the active one and freeze everything else.

    Layers are wrapped in place; their weights keep their bytes. Works on any model whose layers are linear (nn.Linear,
    Linear4bit, GPT-2's Conv1D), embeddings or convolutions.

    Args:
        dtype: of the trained parameters.
        losses: for the starts "eva" and "lora_ga": gives the loss of one batch of examples after another, as
            `(loss(model, batch) for batch in batches)`; taking the next one runs the model.
        sources: for the start "loftq": the weights before they were quantized, "<path of the layer>.weight" -> tensor.
        is_strict: refuse keys of rank_pattern and alpha_pattern, and layer numbers, that match nothing.

    Raises:
        AdapterError: the name is taken or not usable, or a pattern matches nothing. The model is then unchanged.
    """
    check_name(model, name)
    report = MatchReport(name)
    placements = place(model, config, report, is_strict)
    start = find_init(config, losses, sources)
    for placement in placements:  # from here on only a start from data can fail
        if not placement.part.names():
            replace_module(model, placement.part.base_layer, placement.part)
            placement.part.train(model.training)
        placement.attach(name, dtype)
    adapter_configs(model)[name] = config
    if start is not None:
        try:
            start(lora_layers(model, name), name)
        except BaseException:
            remove_adapter(model, name)
            raise
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
            replace_module(model, layer, layer.base_layer)
    del adapter_configs(model)[name]


def adapter_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Return the trained parameters of one adapter, or of all, in model order: A, B, and what its variant adds."""
    found: list[nn.Parameter] = []
    for layer in adapter_parts(model, name).values():
        for one in [name] if name else layer.names():
            found += layer.parameters_of(one).values()
    return found


def check_name(model: nn.Module, name: str) -> None:
    """Raise AdapterError unless `name` can be that of one more adapter of the model."""
    if not name or "." in name or hasattr(_NAMESPACE, name):
        raise AdapterError(f"'{name}' cannot name an adapter: empty, with a dot, or a word that torch's modules use")
    if name in adapter_configs(model):
        raise AdapterError(f"the model already has an adapter '{name}'; remove it first or choose another name")


def check_adapter(model: nn.Module, name: str) -> None:
    """Raise AdapterError, naming the nearest, unless the model has adapter `name`."""
    names = adapter_configs(model)
    if name not in names:
        known = ", ".join(names) or "none"
        raise AdapterError(f"the model has no adapter '{name}'{did_you_mean(name, names)} (attached: {known})")


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
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
        if isinstance(module, QuantizedModule):
            own = [(module.packed, math.prod(module.weight_shape))]
            bias = getattr(module, "bias", None)
            own += [(bias, bias.numel())] if bias is not None else []
        count += sum(size for tensor, size in own if id(tensor) not in seen)
        seen.update(id(tensor) for tensor, _ in own)
    return count
