"""Attach adapters to a model and remove them; the base weights are never touched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ...errors import AdapterError
from ...layers import BASE, AdapterModule
from ...layers.frozen.quantized_module import QuantizedModule
from ..config import LoraConfig, as_config
from ..starts import start_data
from .placement import plan_placements
from .state import (
    adapter_configs,
    adapter_modules,
    check_adapter,
    check_not_in_a_row,
    forget_adapter,
    home_for_new,
    home_of,
    lora_layers,
    replace_module,
    state_of,
)
from .switching import set_adapter, set_trained
from .targeting import MatchReport
from .wrappers import check_joins_training, named_modules

_NAMESPACE = nn.ParameterDict()  # it holds A and B as attributes named after the adapter; its own names are taken


def add_adapter(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    dtype: torch.dtype = torch.float32,
    trained: bool = True,
    *,
    losses: Iterable[Tensor] | None = None,
    sources: Mapping[str, Tensor] | None = None,
    is_strict: bool = True,
) -> MatchReport:
    """Attach a LoRA adapter and make it the active one and the trained one.

    Layers are wrapped in place and their weights keep their bytes. This works on any model that has linear layers
    (nn.Linear, Linear4bit, GPT-2's Conv1D), embeddings or convolutions. The first adapter freezes the whole model;
    later ones leave parameters outside adapters alone.

    Args:
        config: the settings. A LoraConfig of PEFT is taken over, if lorakit has all that it sets.
        dtype: of the trained parameters.
        trained: False freezes the adapter and keeps training the adapters that were trained before.
        losses: for a start that needs them, such as "eva": one scalar loss for each batch of examples, as in
            `(loss(model, batch) for batch in batches)`. Taking the next one runs the model.
        sources: for a start that needs them, such as "loftq": the weights before quantization, in the shapes of their
            layers, such as (out_features, in_features), under "<path of the layer>.weight".
        is_strict: refuse names, layer numbers, and keys of rank_pattern and alpha_pattern that match nothing.

    Raises:
        AdapterError: the name is taken or not usable, or a pattern matches nothing. The model is then unchanged.
    """
    config = as_config(config, [path for path, _ in named_modules(model)])
    if trained:
        check_joins_training(model)
    check_name(model, name)
    model = home_for_new(model)
    report = MatchReport(name)
    placements = plan_placements(model, config, report, is_strict)
    data = start_data(config.start, losses, sources)
    for placement in placements:  # from here on only a start can fail
        module = placement.module
        module.path = placement.path
        if not module.names():
            replace_module(model, module.base_layer, module)
        placement.attach(name, dtype)
    state_of(model).homes = None
    state_of(model).configs[name] = config
    try:
        config.start.run(lora_layers(model, name), name, data)
    except BaseException:
        remove_adapter(model, name)
        raise
    if len(adapter_configs(model)) == 1:
        model.requires_grad_(False)
    set_adapter(model, name)
    set_trained(model, name if trained else state_of(model).trained)
    report.trainable = sum(parameter.numel() for parameter in adapter_parameters(model, name))
    report.total = count_parameters(model)
    return report


def remove_adapter(model: nn.Module, name: str = "default") -> None:
    """Remove an adapter; a layer without another adapter becomes the very module object it was.

    Raises:
        AdapterError: there is no adapter of that name, or `use_rows` has assigned it to a row.
    """
    check_adapter(model, name)
    model = home_of(model, name)
    check_not_in_a_row(model, name)
    for module in adapter_modules(model, name).values():
        module.detach(name)
        if not module.names():
            replace_module(model, module, module.base_layer)
    forget_adapter(model, name)


def adapter_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Return the trained parameters of one adapter, or of all, in model order: A, B, and those its variant adds."""
    parameters: list[nn.Parameter] = []
    for _, module in named_modules(model):
        if isinstance(module, AdapterModule):
            for adapter in [name] if name else module.names():
                parameters += module.parameters_of(adapter).values() if adapter in module.names() else ()
    return parameters


def check_name(model: nn.Module, name: str) -> None:
    """Raise AdapterError unless the model can take a new adapter of this name."""
    if not name or "." in name or hasattr(_NAMESPACE, name) or name == BASE:
        raise AdapterError(f"'{name}' cannot name an adapter: empty, with a dot, or a word that is taken")
    if name in adapter_configs(model):
        raise AdapterError(f"the model already has an adapter '{name}'; remove it first or choose another name")


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters; shared ones count once, and a 4-bit weight as the dense weight it stands for."""
    count, seen = 0, set[int]()
    for module in model.modules():
        sizes: list[tuple[Tensor, int]] = [(p, p.numel()) for p in module.parameters(recurse=False)]
        if isinstance(module, QuantizedModule):
            sizes = [(module.packed, math.prod(module.weight_shape))]
            bias = getattr(module, "bias", None)
            sizes += [(bias, bias.numel())] if bias is not None else []
        count += sum(size for tensor, size in sizes if id(tensor) not in seen)
        seen.update(id(tensor) for tensor, _ in sizes)
    return count
