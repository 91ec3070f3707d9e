"""Which layers an adapter adapts: PEFT's matching rules, with a report, and an error for every pattern that misses."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import nn

from ...errors import AdapterError, did_you_mean
from ...layers import AdaptedLayer, AdapterModule, LoRALinear, adapted_kind
from ..config import LoraConfig
from .wrappers import named_modules

_Value = TypeVar("_Value")


@dataclass
class MatchReport:
    """What add_adapter matched and what it will train.

    Attributes:
        name: of the adapter.
        matched: each pattern of target_modules -> the module paths it matched, without those of exclude_modules.
        parameters: each pattern of target_parameters -> the paths of the parameters it matched.
        saved: each name of modules_to_save -> the paths of the modules that are trained in full.
        excluded: each pattern of exclude_modules -> the paths it removed from target_modules.
        patterns: each key of rank_pattern and alpha_pattern -> the adapted paths it matched.
        missed: sentences on the names in a file's settings that match nothing here and have no tensor either.
        ranks: path of the module, or of the parameter of target_parameters -> rank.
        trainable: number of the adapter's parameters, which are trained unless `is_trained` is False.
        total: number of all parameters; a 4-bit weight counts as the dense weight it stands for.
        source: the folder that the adapter was loaded from, or None.
    """

    name: str
    matched: dict[str, list[str]] = field(default_factory=dict)
    parameters: dict[str, list[str]] = field(default_factory=dict)
    saved: dict[str, list[str]] = field(default_factory=dict)
    excluded: dict[str, list[str]] = field(default_factory=dict)
    patterns: dict[str, list[str]] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    trainable: int = 0
    total: int = 0
    is_trained: bool = True
    source: Path | None = None

    @property
    def modules(self) -> list[str]:
        """The adapted paths, in model order."""
        return list(self.ranks)

    def __str__(self) -> str:
        lines = [f"  {pattern}: {len(paths)} layers" for pattern, paths in self.matched.items()]
        lines += [f"  {pattern}: {len(paths)} parameters" for pattern, paths in self.parameters.items()]
        lines += [f"  {pattern}: {', '.join(paths)} in full" for pattern, paths in self.saved.items()]
        lines += [f"  not {pattern}: {len(paths)} layers" for pattern, paths in self.excluded.items()]
        lines += [f"  {missed}" for missed in self.missed]
        loaded = f" loaded from {self.source}" if self.source else ""
        listing = "\n".join([f"adapter '{self.name}'{loaded} on {len(self.ranks)} layers", *lines])
        counts = trainable_share(self.trainable, self.total)
        if not self.is_trained:
            counts = f"adapter params: {self.trainable:,}, frozen || all params: {self.total:,}"
        return f"{listing}\n{counts}"


def trainable_share(trainable: int, total: int) -> str:
    """Return the counts in the words of PEFT's print_trainable_parameters."""
    share = 100 * trainable / max(1, total)
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every layer that can be adapted, path -> layer; for an adapted layer it is the base layer.

    The model itself is left out, as no module could hold its replacement, and so is everything inside a module that an
    adapter trains in full.
    """
    adaptable: dict[str, nn.Module] = {}
    prefixes: list[str] = []  # of everything inside an adapter's modules
    for path, module in named_modules(model):
        if isinstance(module, AdapterModule):
            prefixes.append(f"{path}.")
            if isinstance(module, AdaptedLayer) and adapted_kind(module.base_layer):
                adaptable[path] = module.base_layer
        elif path and not path.startswith(tuple(prefixes)) and adapted_kind(module):
            adaptable[path] = module
    return adaptable


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the adaptable linear layers, the output head included; "all-linear" leaves the head out."""
    layers = adaptable_layers(model).items()
    return {path: layer for path, layer in layers if adapted_kind(layer) is LoRALinear}


def match_modules(model: nn.Module, config: LoraConfig) -> dict[str, list[str]]:
    """Return what each pattern of target_modules matches, after exclude_modules and layers_to_transform.

    As in PEFT, layers_to_transform does not restrict paths that target_modules spells out in full, and modules that
    modules_to_save trains in full are not adapted as well.

    Raises:
        AdapterError: patterns match nothing (the message names each with the nearest module names), or exclude_modules
            removes every match.
    """
    report = MatchReport("")
    match_targets(model, config, report)
    return report.matched


def match_targets(model: nn.Module, config: LoraConfig, report: MatchReport, is_strict: bool = True) -> None:
    """Fill in the report's `matched` and `excluded`; errors as `match_modules`.

    Args:
        is_strict: whether each pattern must match something. If not, the others are listed as `missed`.
    """
    layers = adaptable_layers(model)
    targets = config.target_modules
    saved = [saved_matcher(name) for name in config.modules_to_save or ()]
    unsaved = [path for path in layers if not any(is_saved(path) for is_saved in saved)]
    candidates = [path for path in unsaved if _layer_selected(path, config)]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        head = _unwrapped(getattr(model, "get_output_embeddings", lambda: None)())
        linear = [path for path in candidates if adapted_kind(layers[path]) is LoRALinear]
        matched = {"all-linear": [path for path in linear if layers[path] is not head]}
    elif isinstance(targets, str):
        matched = {targets: list(filter(_matcher(targets), candidates))}
    else:
        candidates = [path for path in unsaved if path in targets or path in candidates]
        matched = match_names(targets, candidates)
    missed = [pattern for pattern, paths in matched.items() if not paths]
    trains_more = config.target_parameters or config.modules_to_save or config.trainable_token_indices
    if is_strict and (missed or not (matched or trains_more)):
        raise AdapterError(_nothing_matched(missed, unsaved, config.layers_to_transform))
    hints = {pattern: did_you_mean(pattern, _last_names(unsaved)) for pattern in missed}
    report.missed += [f"no module matches '{pattern}' of target_modules{hint}" for pattern, hint in hints.items()]
    matched = {pattern: paths for pattern, paths in matched.items() if paths}
    if config.exclude_modules:
        report.excluded = _excluded(config.exclude_modules, matched)
        excluded = {path for paths in report.excluded.values() for path in paths}
        matched = {pattern: [path for path in paths if path not in excluded] for pattern, paths in matched.items()}
    if is_strict and matched and not any(matched.values()):
        raise AdapterError(f"exclude_modules {config.exclude_modules!r} leaves nothing of target_modules {targets!r}")
    report.matched = matched


def _excluded(patterns: list[str] | str, matched: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return what each pattern of exclude_modules matches among the paths of target_modules."""
    matchers = (
        {patterns: _matcher(patterns)} if isinstance(patterns, str) else {one: _matcher([one]) for one in patterns}
    )
    paths = list(dict.fromkeys(path for paths in matched.values() for path in paths))
    return {pattern: list(filter(is_excluded, paths)) for pattern, is_excluded in matchers.items()}


def check_numbers(paths: Iterable[str], config: LoraConfig) -> None:
    """Raise AdapterError if a number of layers_to_transform is none of the adapted layers'."""
    numbers = config.layers_to_transform
    wanted = [numbers] if isinstance(numbers, int) else numbers or []
    present = {_layer_number(path, config.layers_pattern) for path in paths}
    wrong = [number for number in wanted if number not in present]
    if wrong:
        known = sorted(number for number in present if number is not None)
        raise AdapterError(f"layers_to_transform names {wrong}, but the adapted layers have the numbers {known}")


def check_patterns(paths: Iterable[str], config: LoraConfig) -> dict[str, list[str]]:
    """Return what each key of rank_pattern and alpha_pattern matches among the adapted paths.

    Raises:
        AdapterError: a key matches nothing, or is not a regular expression.
    """
    paths = list(paths)
    keys = dict.fromkeys([*config.rank_pattern, *config.alpha_pattern])
    matched = {key: [path for path in paths if pattern_value({key: True}, path, False)] for key in keys}
    missed = [key for key, matches in matched.items() if not matches]
    if missed:
        names = _last_names(paths)
        lines = [f"no adapted layer matches the pattern '{key}'{did_you_mean(key, names)}" for key in missed]
        raise AdapterError("\n".join(lines))
    return matched


def match_saved(model: nn.Module, config: LoraConfig, report: MatchReport, is_strict: bool = True) -> None:
    """Fill in the report's `saved`: what each name of modules_to_save matches, the outermost modules of that name.

    Args:
        is_strict: whether each name must match something; in PEFT's files of tied weights some do not.

    Raises:
        AdapterError: a name matches nothing.
    """
    modules = [path for path, _ in _plain_modules(model)]
    report.saved = _matched(config.modules_to_save, modules, "module", "modules_to_save", report, is_strict)


def match_parameters(model: nn.Module, config: LoraConfig, report: MatchReport, is_strict: bool = True) -> None:
    """Fill in the report's `parameters`: what each name of target_parameters matches, in model order.

    Args:
        is_strict: as in `match_targets`.

    Raises:
        AdapterError: a name matches nothing.
    """
    parameters = [
        f"{path}.{name}"
        for path, module in _plain_modules(model)
        if path
        for name, _ in module.named_parameters(recurse=False)
    ]
    names = config.target_parameters
    report.parameters = _matched(names, parameters, "parameter", "target_parameters", report, is_strict)


def _matched(
    names: list[str] | None, paths: list[str], kind: str, setting: str, report: MatchReport, is_strict: bool
) -> dict[str, list[str]]:
    """Return what each name of a setting matches, and list the names that match nothing in the report."""
    matched = match_names(names or (), paths)
    for name in [name for name, found in matched.items() if not found]:
        hint = did_you_mean(name, _last_names(paths) if kind == "module" else paths)
        report.missed.append(f"no {kind} matches '{name}' of {setting}{hint}")
        if is_strict:
            raise AdapterError(report.missed[-1])
        del matched[name]
    return matched


def _plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the model as they were before any adapter, with the paths they had."""
    prefixes: list[str] = []  # of everything inside an adapter's modules
    for path, module in named_modules(model):
        if path.startswith(tuple(prefixes)):
            continue
        if isinstance(module, AdapterModule):
            prefixes.append(f"{path}.")
            module = unwrapped(module)
        yield path, module


def match_names(names: Iterable[str], paths: Collection[str]) -> dict[str, list[str]]:
    """Return the paths that each name matches, in their order. A name is a path's last name or a dotted suffix."""
    return {name: list(filter(_matcher([name]), paths)) for name in names}


def last_name(path: str) -> str:
    """Return the module's own name, "q_proj" of "layers.0.q_proj"."""
    return path.rsplit(".", 1)[-1]


def _last_names(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(map(last_name, paths)))


def pattern_value(patterns: Mapping[str, _Value], path: str, default: _Value) -> _Value:
    """Return the value of the first pattern that matches a module path, as PEFT reads rank_pattern and alpha_pattern.

    Raises:
        AdapterError: a pattern is not a regular expression.
    """
    for pattern, value in patterns.items():
        if _compiled(pattern, rf"(.*\.)?({pattern})$").match(path):
            return value
    return default


def rank_and_scaling(config: LoraConfig, path: str) -> tuple[int, float]:
    """Return the rank of the layer at a path and the factor on its B @ A, from a config and its patterns.

    Raises:
        AdapterError: a pattern is not a regular expression.
    """
    rank = pattern_value(config.rank_pattern, path, config.r)
    return rank, config.scaling(rank, pattern_value(config.alpha_pattern, path, config.lora_alpha))


def _matcher(patterns: list[str] | str) -> Callable[[str], bool]:
    """Return the test of a path: a list holds names or dotted suffixes, a string is a regular expression on it all."""
    if isinstance(patterns, str):
        expression = _compiled(patterns)
        return lambda path: expression.fullmatch(path) is not None
    return lambda path: any(path == suffix or path.endswith(f".{suffix}") for suffix in patterns)


def _compiled(pattern: str, expression: str | None = None) -> re.Pattern[str]:
    """Compile `expression`, which holds a config's `pattern`; None: the pattern alone."""
    try:
        return re.compile(expression or pattern)
    except re.error as error:
        raise AdapterError(f"'{pattern}' is not a regular expression: {error}") from None


def saved_matcher(name: str) -> Callable[[str], bool]:
    """Return the test of PEFT that removes a module of modules_to_save, and everything inside it, from the targets."""
    expression = _compiled(name, rf"(^|.*\.){name}($|\..*)")
    return lambda path: expression.match(path) is not None


def _layer_selected(path: str, config: LoraConfig) -> bool:
    numbers = config.layers_to_transform
    if numbers is None or numbers == []:  # PEFT reads an empty list as all
        return True
    number = _layer_number(path, config.layers_pattern)
    return number is not None and number in ([numbers] if isinstance(numbers, int) else numbers)


def _layer_number(path: str, layers_pattern: list[str] | str | None) -> int | None:
    """Return the first number in a path, or with a pattern the number after the layer list's name."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    for pattern in patterns or [""]:
        expression = _compiled(pattern, rf"(?:^|.*?\.){pattern}\.(\d+)\." if pattern else r".*?\.(\d+)\.")
        if match := expression.match(path):
            return int(match[1])
    return None


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the base module inside an adapter's modules, or the module itself where it is none of these."""
    while isinstance(module, AdapterModule):
        module = module.base_layer
    return module


def _unwrapped(module: object) -> object:
    return unwrapped(module) if isinstance(module, nn.Module) else module


def _nothing_matched(missed: list[str], layers: Iterable[str], numbers: list[int] | int | None) -> str:
    names = _last_names(layers)
    if not names:
        return "the model has no linear layer to adapt"
    if not missed:
        return "target_modules is empty; name layers, or 'all-linear'"
    among = "" if numbers in (None, []) else f" among layers {numbers}"
    lines = [f"no module matches '{pattern}'{among}{did_you_mean(pattern, names)}" for pattern in missed]
    return "\n".join(lines) + f"\n(adaptable layers here: {', '.join(names[:20])})"
