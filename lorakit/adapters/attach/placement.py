"""Planning an adapter: which modules its config adapts, how, and in what shapes, before the model changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import nn

from ...errors import AdapterError
from ...layers import AdaptedLayer, AdapterModule, AdapterSpec, LoRALinear, LoRAParameter, adapted_kind
from ...layers.frozen.calls import is_dense
from ..config import LoraConfig
from .copies import place_biases, place_saved, place_tokens
from .known_weights import weight_problem
from .placed import Placement
from .targeting import (
    MatchReport,
    adaptable_layers,
    check_numbers,
    check_patterns,
    match_parameters,
    match_saved,
    match_targets,
    rank_and_scaling,
    unwrapped,
)
from .ties import Ties
from .wrappers import find_module, named_modules


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
    ties = Ties(model)
    _check_shared(model, layers, config, ties)
    placements += place_saved(model, saved, config, ties)
    placements += place_tokens(model, config, ties, is_strict)
    if config.bias == "all":
        placements += place_biases(model, {*layers, *saved}, ties)
    _check_kinds(placements)
    _check_whole(placements, config)
    return placements


def _check_shared(model: nn.Module, layers: Mapping[str, nn.Module], config: LoraConfig, ties: Ties) -> None:
    """Say that an update of a shared weight changes one module alone; refuse if the config wants it otherwise."""
    for path, layer in layers.items():
        weight = layer._parameters.get("weight")
        others = [] if weight is None else list(ties.outside(path, {"weight": weight}))
        if others and config.ensure_weight_tying:
            raise AdapterError(
                f"{path} shares its weight with {', '.join(others)}, and a low-rank update changes {path} alone; "
                "ensure_weight_tying ties trained copies and rows (modules_to_save, trainable_token_indices)"
            )
        tables = [
            other
            for other in others
            if other and other not in layers and isinstance(find_module(model, other), nn.Embedding)
        ]
        if tables and isinstance(layer, nn.Embedding) and config.ensure_weight_tying is None:
            warnings.warn(
                f"{path} shares its table with {', '.join(tables)}, and the update changes what {path} looks up, "
                "not what they do; target these too, or set ensure_weight_tying to false if you want it so",
                stacklevel=4,  # the caller of add_adapter
            )


def _place_layer(model: nn.Module, path: str, config: LoraConfig, report: MatchReport) -> Placement:
    layer = find_module(model, path)
    if not isinstance(layer, AdaptedLayer):
        kind = adapted_kind(layer)
        assert kind is not None
        layer = kind(layer)  # type: ignore[call-arg] # each kind asks its base for its features
    assert isinstance(layer, AdaptedLayer)
    rank, scaling = _rank_and_scaling(path, config, report)
    variant, start = config.update_variant, config.start
    class_name = type(layer.base_layer).__name__
    if problem := variant.problem(layer):
        raise AdapterError(f"{path} is a {class_name}, {problem}")
    if variant.multiplies_base or start.in_base or start.decomposes_weight:
        needs = variant.title if variant.multiplies_base else f"init_lora_weights={start.name!r}"
        if problem := weight_problem(layer):
            raise AdapterError(
                f"{path} is a {class_name}, which {problem}, and {needs} needs the values of the weight; leave it out "
                "with exclude_modules, or train plain LoRA"
            )
    spec = AdapterSpec(rank, scaling, config.lora_dropout, variant, config.bias != "none", start.is_neutral)
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
        for name, parameter in unwrapped(module).named_parameters(recurse=False):
            if f"{path}.{name}" not in wanted:
                continue
            if not is_dense(parameter):
                raise AdapterError(
                    f"{path}.{name} of target_parameters holds {str(parameter.dtype)[6:]}, the codes of a quantized "
                    "weight; an update cannot be added to them, so load the model unquantized"
                )
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
        if other is not placement.module and placement.follows:
            raise AdapterError(
                f"{placement.path} shares its weight with {placement.follows} and follows what is trained there, so it "
                f"cannot be a {type(other).__name__} as well"
            )
        if other is not placement.module and not isinstance(other, LoRAParameter):
            raise AdapterError(
                f"{placement.path} cannot be a {type(other).__name__} and a {type(placement.module).__name__} at once"
            )
