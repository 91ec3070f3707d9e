"""Planning an adapter: which modules its config adapts, how, and in what shapes, before the model changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from ...errors import AdapterError
from ...layers import (
    VARIANTS,
    AdaptedLayer,
    AdapterModule,
    AdapterSpec,
    LoRALinear,
    LoRAParameter,
    SavedModule,
    TiedHead,
    TrainedTokens,
    Variant,
    adapted_kind,
)
from ...layers.frozen.quantized_module import QuantizedModule
from ..config import LoraConfig
from .targeting import (
    MatchReport,
    adaptable_layers,
    check_numbers,
    check_patterns,
    match_names,
    match_parameters,
    match_saved,
    match_targets,
    rank_and_scaling,
    unwrapped,
)
from .wrappers import find_module, named_modules

_Module = TypeVar("_Module", SavedModule, TrainedTokens)
Attach = Callable[[str, torch.dtype], None]


@dataclass(frozen=True)
class Placement:
    """The plan for one module that an adapter adapts.

    Attributes:
        path: of the module in the model.
        module: the module that will hold the adapter there: one that already holds other adapters, or a new one that
            is not in the model yet.
        shapes: of the adapter's trained parameters there, table or parameter name -> shape.
        attach: adds the adapter to `module`: attach(name, dtype).
        variant: how the update enters the layer.
    """

    path: str
    module: AdapterModule
    shapes: dict[str, tuple[int, ...]]
    attach: Attach
    variant: Variant = VARIANTS["plain"]


def plan_placements(
    model: nn.Module, config: LoraConfig, report: MatchReport, is_strict: bool = True
) -> list[Placement]:
    """Return all placements of an adapter and fill in the report; the model is not changed.

    Args:
        is_strict: whether each name, each key of rank_pattern and alpha_pattern, and each number of
            layers_to_transform must match something; in PEFT's files some do not.

    Raises:
        AdapterError: a setting matches nothing, or a match cannot be trained as the config asks.
    """
    match_targets(model, config, report, is_strict)
    match_parameters(model, config, report, is_strict)
    match_saved(model, config, report, is_strict)
    wanted = {path for paths in report.matched.values() for path in paths}
    # In model order: the layers then draw their random numbers in the same order every time.
    layers = {path: layer for path, layer in adaptable_layers(model).items() if path in wanted}
    parameters = {path for paths in report.parameters.values() for path in paths}
    adapted = [*layers, *parameters]
    if is_strict:
        check_numbers(layers, config)
        report.patterns = check_patterns(adapted, config)
    placements = [_place_layer(model, path, config, report) for path in layers]
    placements += _place_parameters(model, parameters, config, report)
    saved = [path for paths in report.saved.values() for path in paths]
    placements += _place_saved(model, saved, config)
    placements += _place_tokens(model, config, is_strict)
    if config.bias == "all":
        placements += _place_biases(model, {*layers, *saved})
    _check_kinds(placements)
    _check_whole(placements, config)
    return placements


def _place_layer(model: nn.Module, path: str, config: LoraConfig, report: MatchReport) -> Placement:
    layer = find_module(model, path)
    if not isinstance(layer, AdaptedLayer):
        kind = adapted_kind(layer)
        assert kind is not None
        layer = kind(layer)  # type: ignore[call-arg] # each kind asks its base for its features
    assert isinstance(layer, AdaptedLayer)
    rank, scaling = _rank_and_scaling(path, config, report)
    variant, neutral_start = config.update_variant, config.start.is_neutral
    if problem := variant.problem(layer):
        raise AdapterError(f"{path} is a {type(layer.base_layer).__name__}, {problem}")
    spec = AdapterSpec(rank, scaling, config.lora_dropout, variant, config.bias != "none", neutral_start)
    return Placement(path, layer, layer.shapes(spec), partial(_add_to_layer, layer, spec), variant)


def _add_to_layer(layer: AdaptedLayer, spec: AdapterSpec, name: str, dtype: torch.dtype) -> None:
    layer.add(name, spec, dtype)


def _place_parameters(
    model: nn.Module, paths: Iterable[str], config: LoraConfig, report: MatchReport
) -> list[Placement]:
    """Place updates of parameters; those of one module wrap each other, the last one outermost, as in PEFT."""
    placements = []
    outermost: dict[str, nn.Module] = {}
    wanted = set(paths)
    for path, module in named_modules(model):
        if isinstance(module, LoRAParameter) and path.endswith(".base_layer"):
            continue
        for name, _ in unwrapped(module).named_parameters(recurse=False):
            if f"{path}.{name}" not in wanted:
                continue
            outer = outermost.get(path, module)
            layer = _layer_of_parameter(outer, name)
            if layer is None:
                if isinstance(outer, AdapterModule) and not isinstance(outer, LoRAParameter):
                    raise AdapterError(f"{path} is adapted as a whole; its parameter '{name}' cannot be as well")
                layer = outermost[path] = LoRAParameter(outer, name)
            rank, scaling = _rank_and_scaling(f"{path}.{name}", config, report)
            spec = AdapterSpec(rank, scaling, neutral_start=config.start.is_neutral)
            placements.append(Placement(path, layer, layer.shapes(spec), partial(_add_to_layer, layer, spec)))
    return placements


def _layer_of_parameter(module: nn.Module, parameter: str) -> LoRAParameter | None:
    while isinstance(module, LoRAParameter):
        if module.parameter == parameter:
            return module
        module = module.base_layer
    return None


def _place_saved(model: nn.Module, paths: list[str], config: LoraConfig) -> list[Placement]:
    placements = []
    for path in paths:
        module = _module_of_kind(model, path, SavedModule)
        if any(isinstance(inner, QuantizedModule) for inner in module.base_layer.modules()):
            raise AdapterError(f"{path} of modules_to_save is in 4 bits, which cannot be trained; load it unquantized")
        placements.append(Placement(path, module, module.shapes(), partial(_add_copy, module, None)))
        tied = [other for other in _tied_to(model, module.base_layer) if other not in paths]
        if tied and config.ensure_weight_tying is None:
            raise AdapterError(
                f"{path} of modules_to_save shares its weight with {', '.join(tied)}; set ensure_weight_tying to true "
                "(both use the trained copy) or false (the others keep the base's weight)"
            )
        if tied and config.ensure_weight_tying:
            placements += [_place_tied_head(model, other, module) for other in tied]
    return placements


def _add_copy(module: SavedModule, parameters: list[str] | None, name: str, dtype: torch.dtype) -> None:
    module.add(name, dtype, parameters)


def _place_tokens(model: nn.Module, config: LoraConfig, is_strict: bool) -> list[Placement]:
    wanted = config.trainable_token_indices
    if not wanted:
        return []
    tables = {p: m for p, m in adaptable_layers(model).items() if isinstance(m, nn.Embedding)}
    tables |= {p: m.base_layer for p, m in named_modules(model) if isinstance(m, TrainedTokens)}
    placements = []
    for path, tokens in _tokens_by_table(model, wanted, tables, is_strict).items():
        table = tables[path]
        if max(tokens, default=0) >= table.num_embeddings or not tokens or len(set(tokens)) < len(tokens):
            raise AdapterError(
                f"trainable_token_indices {tokens} of {path}: expected different tokens below {table.num_embeddings}"
            )
        module = _module_of_kind(model, path, TrainedTokens)
        placements.append(Placement(path, module, module.shapes(tokens), partial(_add_tokens, module, tokens)))
        placements += [_place_tied_head(model, other, module) for other in _tied_to(model, table)]
    return placements


def _tokens_by_table(
    model: nn.Module, wanted: list[int] | dict[str, list[int]], tables: dict[str, nn.Embedding], is_strict: bool
) -> dict[str, list[int]]:
    """Return path of an embedding table -> tokens to train in it; a bare list means the input embedding."""
    if isinstance(wanted, list):
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        embedding = unwrapped(embedding) if isinstance(embedding, nn.Module) else None
        names = [path for path, table in tables.items() if table is embedding or path.endswith("embed_tokens")]
        chosen = {names[0]: wanted} if names else {}
    else:
        matched = match_names(wanted, tables)
        is_complete = all(matched.values()) or not is_strict
        chosen = {path: wanted[name] for name, paths in matched.items() for path in paths} if is_complete else {}
    if is_strict and not chosen:
        raise AdapterError(f"trainable_token_indices finds no embedding table (tables here: {', '.join(tables)})")
    return chosen


def _add_tokens(module: TrainedTokens, tokens: list[int], name: str, dtype: torch.dtype) -> None:
    module.add(name, tokens, dtype)


def _place_biases(model: nn.Module, taken: set[str]) -> list[Placement]:
    """Place a trained copy of each bias, except in the modules at the paths `taken` and inside them."""
    placements = []
    for path, module in list(named_modules(model)):
        inner = unwrapped(module)
        is_inside = any(path.startswith(f"{other}.") for other in taken)
        is_inside = is_inside or re.search(r"\.(base_layer|copies)(\.|$)", path) is not None
        if not path or path in taken or is_inside or not isinstance(inner._parameters.get("bias"), nn.Parameter):
            continue
        saved = _module_of_kind(model, path, SavedModule)
        placements.append(Placement(path, saved, saved.shapes(["bias"]), partial(_add_copy, saved, ["bias"])))
    return placements


def _module_of_kind(model: nn.Module, path: str, kind: type[_Module]) -> _Module:
    """Return the module of a kind that already holds adapters at a path, or a new one around the module there."""
    module = find_module(model, path)
    if isinstance(module, AdapterModule):
        if not isinstance(module, kind):
            raise AdapterError(f"{path} is already a {type(module).__name__} of another adapter; remove that one first")
        return module
    return kind(module)  # type: ignore[arg-type]


def _place_tied_head(model: nn.Module, path: str, source: TrainedTokens | SavedModule) -> Placement:
    module = find_module(model, path)
    head = module if isinstance(module, TiedHead) else TiedHead(module, source)  # type: ignore[arg-type]
    return Placement(path, head, {}, lambda name, dtype: head.add(name))


def _tied_to(model: nn.Module, module: nn.Module) -> list[str]:
    """Return the paths of linear layers that share a module's weight."""
    weight = module._parameters.get("weight")
    plain = ((path, unwrapped(other)) for path, other in named_modules(model) if ".base_layer" not in path)
    return [
        path
        for path, other in plain
        if isinstance(other, nn.Linear) and other is not module and other._parameters.get("weight") is weight
    ]


def _rank_and_scaling(path: str, config: LoraConfig, report: MatchReport) -> tuple[int, float]:
    rank, scaling = rank_and_scaling(config, path)
    report.ranks[path] = rank
    return rank, scaling


def _check_whole(placements: list[Placement], config: LoraConfig) -> None:
    """Raise AdapterError if a placement reads a weight of which this process has only a part."""
    for placement in placements:
        is_plain = isinstance(placement.module, LoRALinear) and placement.variant.name == "plain"
        is_plain = is_plain and config.start.name in (True, False, "gaussian") and config.bias == "none"
        if not is_plain and any(hasattr(p, "device_mesh") for p in placement.module.base_layer.parameters()):
            raise AdapterError(
                f"fully_shard has divided {placement.path} among processes, and this adapter starts from its whole "
                "values: attach the adapter first and divide the model then"
            )


def _check_kinds(placements: list[Placement]) -> None:
    """Raise AdapterError if two modules would take one place; updates of parameters may, since they wrap each other."""
    first: dict[str, AdapterModule] = {}
    for placement in placements:
        other = first.setdefault(placement.path, placement.module)
        if other is not placement.module and not isinstance(other, LoRAParameter):
            raise AdapterError(
                f"{placement.path} cannot be a {type(other).__name__} and a {type(placement.module).__name__} at once"
            )
