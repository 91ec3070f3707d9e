"""Attach adapters to a model and take them off: the base is never touched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ...errors import AdapterError
from ...layers import BASE
from ...layers.frozen.quantized_module import QuantizedModule
from ..config import LoraConfig
from ..starts import start_data
from .placement import plan_placements
from .state import (
    adapter_configs,
    adapter_modules,
    check_adapter,
    check_not_in_a_row,
    forget_adapter,
    lora_layers,
    replace_module,
    state_of,
)
from .switching import disable_adapters, set_adapter, set_trained
from .targeting import MatchReport

__all__ = [
    "adapter_configs",
    "adapter_modules",
    "adapter_parameters",
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
    *,
    losses: Iterable[Tensor] | None = None,
    sources: Mapping[str, Tensor] | None = None,
    is_strict: bool = True,
) -> MatchReport:
    """Attach a LoRA adapter and make it the one that is active and the one that is trained.

    Layers are wrapped in place; their weights keep their bytes. Works on any model whose layers are linear (nn.Linear,
    Linear4bit, GPT-2's Conv1D), embeddings or convolutions. The first adapter freezes the whole model; later ones leave
    alone what is not an adapter's.

    Args:
        dtype: of the trained parameters.
        trained: False: frozen, and what was trained before stays so.
        losses: for a start that needs them, such as "eva": gives the loss of one batch of examples after another, as
            `(loss(model, batch) for batch in batches)`; taking the next one runs the model.
        sources: for a start that needs them, such as "loftq": the weights before they were quantized, under
            "<path of the layer>.weight".
        is_strict: refuse keys of rank_pattern and alpha_pattern, and layer numbers, that match nothing.

    Raises:
        AdapterError: the name is taken or not usable, or a pattern matches nothing. The model is then unchanged.
    """
    check_name(model, name)
    report = MatchReport(name)
    placements = plan_placements(model, config, report, is_strict)
    data = start_data(config.start, losses, sources)
    for placement in placements:  # from here on only a start can fail
        if not placement.part.names():
            replace_module(model, placement.part.base_layer, placement.part)
            placement.part.train(model.training)
        placement.attach(name, dtype)
    state_of(model).parts = None
    adapter_configs(model)[name] = config
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
    """Take an adapter off; a layer that carries no other becomes the very module object it was.

    Raises:
        AdapterError: there is no adapter of that name, or `use_rows` has given it to a row.
    """
    check_adapter(model, name)
    check_not_in_a_row(model, name)
    for layer in adapter_modules(model, name).values():
        layer.detach(name)
        if not layer.names():
            replace_module(model, layer, layer.base_layer)
    forget_adapter(model, name)


def adapter_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Return the trained parameters of one adapter, or of all, in model order: A, B, and what its variant adds."""
    found: list[nn.Parameter] = []
    for layer in adapter_modules(model, name).values():
        for one in [name] if name else layer.names():
            found += layer.parameters_of(one).values()
    return found


def check_name(model: nn.Module, name: str) -> None:
    """Raise AdapterError unless `name` can be that of one more adapter of the model."""
    if not name or "." in name or hasattr(_NAMESPACE, name) or name == BASE:
        raise AdapterError(f"'{name}' cannot name an adapter: empty, with a dot, or a word that is taken")
    if name in adapter_configs(model):
        raise AdapterError(f"the model already has an adapter '{name}'; remove it first or choose another name")


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
