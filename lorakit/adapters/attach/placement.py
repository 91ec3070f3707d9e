"""What a config asks for on a model, worked out before anything is changed: which part goes where, of what shapes."""

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

_Part = TypeVar("_Part", SavedModule, TrainedTokens)
Attach = Callable[[str, torch.dtype], None]


@dataclass(frozen=True)
class Placement:
    """One part of an adapter, to be put in the place of a module.

    Attributes:
        path: of the module.
        part: the part that stands there already, for other adapters, or a new one that nothing holds yet.
        shapes: what the adapter will train there, table or parameter name -> shape.
        attach: adds the adapter to the part: attach(name, dtype).
        variant: of the update, where the part has one.
    """

    path: str
    part: AdapterModule
    shapes: dict[str, tuple[int, ...]]
    attach: Attach
    variant: Variant = VARIANTS["plain"]


def plan_placements(
    model: nn.Module, config: LoraConfig, report: MatchReport, is_strict: bool = True
) -> list[Placement]:
    """Return every part of an adapter, in model order, and fill in the report; the model is not changed.

    Args:
        is_strict: whether a key of rank_pattern and alpha_pattern, or a number of layers_to_transform, must match
            something; files of PEFT hold some that do not.

    Raises:
        AdapterError: something matches nothing, or cannot be trained so.
    """
    match_targets(model, config, report)
    report.parameters = match_parameters(model, config)
    report.saved = match_saved(model, config)
    wanted = {path for paths in report.matched.values() for path in paths}
    # In model order, so that the random init is repeatable.
    layers = {path: layer for path, layer in adaptable_layers(model).items() if path in wanted}
    parameters = {path for paths in report.parameters.values() for path in paths}
    adapted = [*layers, *parameters]
    if is_strict:
        check_numbers(layers, config)
        report.patterns = check_patterns(adapted, config)
    placements = [_layer(model, path, config, report) for path in layers]
    placements += _parameters(model, parameters, config, report)
    saved = [path for paths in report.saved.values() for path in paths]
    placements += _saved(model, saved, config)
    placements += _tokens(model, config)
    if config.bias == "all":
        placements += _biases(model, {*layers, *saved})
    _check_apart(adapted, placements)
    return placements


def _layer(model: nn.Module, path: str, config: LoraConfig, report: MatchReport) -> Placement:
    module = model.get_submodule(path)
    part = module
    if not isinstance(module, AdaptedLayer):
        kind = adapted_kind(module)
        assert kind is not None
        part = kind(module)  # type: ignore[call-arg] # each kind asks its base for its features
    assert isinstance(part, AdaptedLayer)
    rank, scaling = _rank_and_scaling(path, config, report)
    variant, neutral_start = config.update_variant, config.start.is_neutral
    if problem := variant.problem(part):
        raise AdapterError(f"{path} is a {type(part.base_layer).__name__}, {problem}")
    spec = AdapterSpec(rank, scaling, config.lora_dropout, variant, config.bias != "none", neutral_start)
    return Placement(path, part, part.shapes(spec), partial(_attach_new, part, spec), variant)


def _attach_new(part: AdaptedLayer, spec: AdapterSpec, name: str, dtype: torch.dtype) -> None:
    part.add(name, spec, dtype)


def _parameters(model: nn.Module, paths: Iterable[str], config: LoraConfig, report: MatchReport) -> list[Placement]:
    """Several parameters of one module are parts around each other, the last one outermost, as in PEFT."""
    placements = []
    outermost: dict[str, nn.Module] = {}
    wanted = set(paths)
    for path, module in model.named_modules():
        if isinstance(module, LoRAParameter) and path.endswith(".base_layer"):
            continue
        for name, _ in unwrapped(module).named_parameters(recurse=False):
            if f"{path}.{name}" not in wanted:
                continue
            found = outermost.get(path, module)
            part = _parameter_part(found, name)
            if part is None:
                if isinstance(found, AdapterModule) and not isinstance(found, LoRAParameter):
                    raise AdapterError(f"{path} is adapted as a whole; its parameter '{name}' cannot be as well")
                part = outermost[path] = LoRAParameter(found, name)
            rank, scaling = _rank_and_scaling(f"{path}.{name}", config, report)
            spec = AdapterSpec(rank, scaling, neutral_start=config.start.is_neutral)
            placements.append(Placement(path, part, part.shapes(spec), partial(_attach_new, part, spec)))
    return placements


def _parameter_part(module: nn.Module, parameter: str) -> LoRAParameter | None:
    while isinstance(module, LoRAParameter):
        if module.parameter == parameter:
            return module
        module = module.base_layer
    return None


def _saved(model: nn.Module, paths: list[str], config: LoraConfig) -> list[Placement]:
    placements = []
    for path in paths:
        part = _part(model, path, SavedModule)
        if any(isinstance(module, QuantizedModule) for module in part.base_layer.modules()):
            raise AdapterError(f"{path} of modules_to_save is in 4 bits, which cannot be trained; load it unquantized")
        attach = partial(_attach_saved, part, None)
        placements.append(Placement(path, part, part.shapes(), attach))
        tied = [other for other in _tied(model, part.base_layer) if other not in paths]
        if tied and config.ensure_weight_tying is None:
            raise AdapterError(
                f"{path} of modules_to_save shares its weight with {', '.join(tied)}; set ensure_weight_tying to true "
                "(both use the trained copy) or false (the others keep the base's weight)"
            )
        if tied and config.ensure_weight_tying:
            placements += [_tied_head(model, other, part) for other in tied]
    return placements


def _attach_saved(part: SavedModule, parameters: list[str] | None, name: str, dtype: torch.dtype) -> None:
    part.add(name, dtype, parameters)


def _tokens(model: nn.Module, config: LoraConfig) -> list[Placement]:
    wanted = config.trainable_token_indices
    if not wanted:
        return []
    tables = {p: m for p, m in adaptable_layers(model).items() if isinstance(m, nn.Embedding)}
    tables |= {p: m.base_layer for p, m in model.named_modules() if isinstance(m, TrainedTokens)}
    if isinstance(wanted, list):
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        embedding = unwrapped(embedding) if isinstance(embedding, nn.Module) else None
        names = [path for path, table in tables.items() if table is embedding or path.endswith("embed_tokens")]
        chosen = {names[0]: wanted} if names else {}
    else:
        found = match_names(wanted, tables)
        chosen = {path: wanted[key] for key, paths in found.items() for path in paths if found[key]}
        if not all(found.values()):
            chosen = {}
    if not chosen:
        raise AdapterError(f"trainable_token_indices finds no embedding table (tables here: {', '.join(tables)})")
    placements = []
    for path, tokens in chosen.items():
        table = tables[path]
        if max(tokens, default=0) >= table.num_embeddings or not tokens or len(set(tokens)) < len(tokens):
            raise AdapterError(
                f"trainable_token_indices {tokens} of {path}: expected different tokens below {table.num_embeddings}"
            )
        part = _part(model, path, TrainedTokens)
        placements.append(Placement(path, part, part.shapes(tokens), partial(_attach_tokens, part, tokens)))
        placements += [_tied_head(model, other, part) for other in _tied(model, table)]
    return placements


def _attach_tokens(part: TrainedTokens, tokens: list[int], name: str, dtype: torch.dtype) -> None:
    part.add(name, tokens, dtype)


def _biases(model: nn.Module, taken: set[str]) -> list[Placement]:
    """A copy of the bias of every module that is not adapted and has one."""
    placements = []
    for path, module in list(model.named_modules()):
        inner = unwrapped(module)
        is_inside = any(path.startswith(f"{other}.") for other in taken)
        is_inside = is_inside or re.search(r"\.(base_layer|copies)(\.|$)", path) is not None
        if not path or path in taken or is_inside or not isinstance(inner._parameters.get("bias"), nn.Parameter):
            continue
        part = _part(model, path, SavedModule)
        attach = partial(_attach_saved, part, ["bias"])
        placements.append(Placement(path, part, part.shapes(["bias"]), attach))
    return placements


def _part(model: nn.Module, path: str, kind: type[_Part]) -> _Part:
    module = model.get_submodule(path)
    if isinstance(module, AdapterModule):
        if not isinstance(module, kind):
            raise AdapterError(f"{path} is already a {type(module).__name__} of another adapter; remove that one first")
        return module
    return kind(module)  # type: ignore[arg-type]


def _tied_head(model: nn.Module, path: str, source: TrainedTokens | SavedModule) -> Placement:
    module = model.get_submodule(path)
    part = module if isinstance(module, TiedHead) else TiedHead(module, source)  # type: ignore[arg-type]
    return Placement(path, part, {}, lambda name, dtype: part.add(name))


def _tied(model: nn.Module, module: nn.Module) -> list[str]:
    """Return the paths of linear layers that share a module's weight."""
    weight = module._parameters.get("weight")
    plain = ((path, unwrapped(other)) for path, other in model.named_modules() if ".base_layer" not in path)
    return [
        path
        for path, other in plain
        if isinstance(other, nn.Linear) and other is not module and other._parameters.get("weight") is weight
    ]


def _rank_and_scaling(path: str, config: LoraConfig, report: MatchReport) -> tuple[int, float]:
    rank, scaling = rank_and_scaling(config, path)
    report.ranks[path] = rank
    return rank, scaling


def _check_apart(adapted: list[str], placements: list[Placement]) -> None:
    """Raise AdapterError where two parts of an adapter would take the place of one module."""
    seen: dict[str, AdapterModule] = {}
    for placement in placements:
        other = seen.setdefault(placement.path, placement.part)
        if other is not placement.part and not isinstance(other, LoRAParameter):
            raise AdapterError(
                f"{placement.path} cannot be a {type(other).__name__} and a {type(placement.part).__name__} at once"
            )
