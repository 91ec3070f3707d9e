"""Which layers an adapter goes to: PEFT's matching rules, with a report and no silent miss."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import AdapterError, did_you_mean
from ..layers import Linear4bit, LoRALinear
from .config import LoraConfig

_Value = TypeVar("_Value")
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass
class MatchReport:
    """What add_adapter matched and what it will train.

    Attributes:
        name: of the adapter.
        matched: each pattern of target_modules -> the module paths it matched.
        ranks: module path -> rank.
        trainable, total: parameter counts; a 4-bit weight counts as the weights it stands for.
    """

    name: str
    matched: dict[str, list[str]]
    ranks: dict[str, int] = field(default_factory=dict)
    trainable: int = 0
    total: int = 0

    @property
    def modules(self) -> list[str]:
        """The adapted module paths, in model order."""
        return list(self.ranks)

    def __str__(self) -> str:
        patterns = "\n".join(f"  {pattern}: {len(paths)} layers" for pattern, paths in self.matched.items())
        share = 100 * self.trainable / max(1, self.total)
        return (
            f"adapter '{self.name}' on {len(self.ranks)} layers\n{patterns}\n"
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"
        )


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | Linear4bit]:
    """Return every linear layer that can be adapted, path -> layer; an adapted layer gives its base layer.

    Not among them are the model itself, which nothing could hold in its place, and the output projection of
    nn.MultiheadAttention, whose weight is read without calling the layer.
    """
    found: dict[str, nn.Linear | Linear4bit] = {}
    wrapped = {module.base_layer for module in model.modules() if isinstance(module, LoRALinear)}
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            found[path] = module.base_layer
        elif isinstance(module, nn.Linear | Linear4bit) and path and module not in wrapped:
            found[path] = module
    return {path: layer for path, layer in found.items() if not isinstance(layer, NonDynamicallyQuantizableLinear)}


def match_modules(model: nn.Module, config: LoraConfig) -> dict[str, list[str]]:
    """Return what each pattern of target_modules matches, after exclude_modules and layers_to_transform.

    As in PEFT, layers_to_transform does not narrow a path of target_modules that is spelled out in full.

    Raises:
        AdapterError: a pattern matches nothing; all such patterns are named, with the nearest module names. Or
            exclude_modules leaves nothing of what they match.
    """
    layers = linear_layers(model)
    targets = config.target_modules
    candidates = [path for path in layers if _layer_selected(path, config.layers_to_transform)]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        matched = {"all-linear": [path for path in candidates if layers[path] is not _unwrapped(head)]}
    elif isinstance(targets, str):
        matched = {targets: list(filter(_matcher(targets), candidates))}
    else:
        candidates = [path for path in layers if path in targets or path in candidates]
        matched = {pattern: list(filter(_matcher([pattern]), candidates)) for pattern in targets}
    missed = [pattern for pattern, paths in matched.items() if not paths]
    if missed or not matched:
        raise AdapterError(_nothing_matched(missed, layers))
    if config.exclude_modules:
        excluded = _matcher(config.exclude_modules)
        matched = {pattern: [path for path in paths if not excluded(path)] for pattern, paths in matched.items()}
    if not any(matched.values()):
        raise AdapterError(f"exclude_modules {config.exclude_modules!r} leaves nothing of target_modules {targets!r}")
    return matched


def pattern_value(patterns: Mapping[str, _Value], path: str, default: _Value) -> _Value:
    """Return the value of the first pattern that matches a module path, as PEFT reads rank_pattern, alpha_pattern.

    Raises:
        AdapterError: a pattern is not a regular expression.
    """
    for pattern, value in patterns.items():
        if _compiled(pattern, rf"(.*\.)?({pattern})$").match(path):
            return value
    return default


def _matcher(patterns: list[str] | str) -> Callable[[str], bool]:
    """A list holds names or dotted suffixes; a lone string is a regular expression on the whole path."""
    if isinstance(patterns, str):
        expression = _compiled(patterns)
        return lambda path: expression.fullmatch(path) is not None
    return lambda path: any(path == suffix or path.endswith(f".{suffix}") for suffix in patterns)


def _compiled(pattern: str, whole: str | None = None) -> re.Pattern[str]:
    try:
        return re.compile(whole or pattern)
    except re.error as error:
        raise AdapterError(f"'{pattern}' is not a regular expression: {error}") from None


def _layer_selected(path: str, numbers: list[int] | int | None) -> bool:
    if numbers is None or numbers == []:  # PEFT reads an empty list as all
        return True
    found = _LAYER_NUMBER.search(path)
    return found is not None and int(found[1]) in ([numbers] if isinstance(numbers, int) else numbers)


def _unwrapped(module: object) -> object:
    return module.base_layer if isinstance(module, LoRALinear) else module


def _nothing_matched(missed: list[str], layers: Iterable[str]) -> str:
    names = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in layers))
    if not names:
        return "the model has no linear layer to adapt"
    if not missed:
        return "target_modules is empty; name layers, or 'all-linear'"
    lines = [f"no module matches '{pattern}'{did_you_mean(pattern, names)}" for pattern in missed]
    return "\n".join(lines) + f"\n(linear layers here: {', '.join(names[:20])})"
