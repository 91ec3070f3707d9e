"""`adapter_status`: which adapters are attached, active, trained or merged, and where the model departs from that.

The record (`attach/state.py`) holds what was asked for. This module compares the model with it, because any code can
change requires_grad flags, layers and devices.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from ..layers import AdaptedLayer, AdapterModule
from .attach.state import adapter_modules, homes, known_modules, state_of
from .attach.switching import idle_adapters
from .attach.wrappers import named_modules
from .merging.swaps import merged_state


@dataclass(frozen=True)
class AdapterSummary:
    """One adapter.

    Attributes:
        name: of the adapter.
        active: whether its update is added.
        trained: whether its parameters get gradients.
        merged: whether it is part of the weights.
        rows: number of rows that use it, within `use_rows`.
        ranks: rank -> number of layers.
        parameters: number of elements it trains, or would train.
        dtypes, devices: of its parameters.
        on_host: whether it waits in host memory while it is not in use.
        irregularities: how the model departs from the record, one sentence each.
    """

    name: str
    active: bool
    trained: bool
    merged: bool = False
    rows: int = 0
    ranks: dict[int, int] = field(default_factory=dict)
    parameters: int = 0
    dtypes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    on_host: bool = False
    irregularities: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        flags = {"merged": self.merged, "active": self.active, "trained": self.trained, "on host": self.on_host}
        words = [word for word, is_set in flags.items() if is_set] or ["attached"]
        words += [f"{self.rows} rows"] if self.rows else []
        ranks = ", ".join(f"r={rank} on {count} layers" for rank, count in self.ranks.items())
        where = [", ".join(self.dtypes), ", ".join(self.devices)]
        return "; ".join(text for text in [", ".join(words), ranks, f"{self.parameters:,} parameters", *where] if text)


@dataclass(frozen=True)
class AdapterStatus:
    """All adapters of a model; it prints as one line for each.

    Attributes:
        adapters: name -> its summary; if several parts of the model have adapters of their own, "name of part" -> it.
        disabled: whether a `disable_adapters` context is open.
        also_trained: number of elements that get gradients and belong to no adapter.
        irregularities: how the model and each adapter depart from the record, one sentence each.
    """

    adapters: dict[str, AdapterSummary]
    disabled: bool
    also_trained: int
    irregularities: list[str]

    def __str__(self) -> str:
        width = max(map(len, self.adapters), default=0)
        lines = [f"{name:<{width}}  {info}" for name, info in self.adapters.items()] or ["no adapter"]
        lines += ["(disabled)"] if self.disabled else []
        lines += [f"(also trained: {self.also_trained:,} parameters of no adapter)"] if self.also_trained else []
        return "\n".join(lines + [f"irregular: {problem}" for problem in self.irregularities])


def adapter_status(model: nn.Module) -> AdapterStatus:
    """Return the adapters of a model and every departure of the model from its record."""
    found = homes(model)
    modules = {path: module for path, module in named_modules(model) if isinstance(module, AdapterModule)}
    adapters: dict[str, AdapterSummary] = {}
    for home in found:
        parts = [path for path, module in named_modules(model) if module is home and len(found) > 1]
        of_part = f" of {parts[0]}" if parts and parts[0] else ""
        adapters |= {f"{name}{of_part}": _summary(home, name) for name in state_of(home).configs}
        merged = merged_state(home)
        for name in merged.names if merged else ():
            taken = f"{name}{of_part}" in adapters  # a new adapter may have the merged one's name
            key = f"{name}{of_part} (merged)" if taken else f"{name}{of_part}"
            adapters[key] = AdapterSummary(name, active=False, trained=False, merged=True)
    known = {module for home in found for module in known_modules(home)}
    problems = [
        f"{path} was not put in by add_adapter: switching does not reach it"
        for path, module in modules.items()
        if module not in known
    ]
    in_adapters = {
        id(parameter)
        for module in modules.values()
        for name in module.names()
        for parameter in module.parameters_of(name).values()
    }
    also_trained = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in in_adapters)
    problems += [f"{name}: {problem}" for name, summary in adapters.items() for problem in summary.irregularities]
    return AdapterStatus(adapters, any(state_of(home).disabled for home in found), also_trained, problems)


def _summary(model: nn.Module, name: str) -> AdapterSummary:
    state = state_of(model)
    modules = adapter_modules(model, name)
    layers = [module for module in modules.values() if isinstance(module, AdaptedLayer)]
    parameters = [p for module in modules.values() for p in module.parameters_of(name).values()]
    return AdapterSummary(
        name,
        active=name in state.active,
        trained=name in state.trained,
        rows=state.rows[-1].names.count(name) if state.rows else 0,
        ranks=dict(Counter(len(layer.lora_A[name]) // layer.matrix_shapes(1)[0][0] for layer in layers)),
        parameters=sum(parameter.numel() for parameter in parameters),
        dtypes=tuple(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in parameters)),
        devices=tuple(dict.fromkeys(str(p.device) for p in parameters)),
        on_host=name in state.on_host,
        irregularities=_irregularities(model, name, modules),
    )


def _irregularities(model: nn.Module, name: str, modules: dict[str, AdapterModule]) -> list[str]:
    state = state_of(model)
    is_trained = name in state.trained
    is_active = name in state.active and not state.disabled and not state.rows
    parameters = [p for module in modules.values() for p in module.parameters_of(name).values()]
    flipped = sum(parameter.requires_grad != is_trained for parameter in parameters)
    problems = ["trained, but not active: no gradient reaches it"] if name in idle_adapters(model) else []
    if flipped:
        asked, actual = ("trained", "frozen") if is_trained else ("frozen", "trained")
        problems.append(f"set to be {asked}, but {flipped} of its {len(parameters)} parameters are {actual}")
    for path, module in modules.items():
        if (name in module.active) != is_active:
            problems.append(f"{path} has it {'in' if is_active else ''}active, unlike the model")
        home = module.device
        away = {str(p.device) for p in module.parameters_of(name).values() if p.device != home}
        if away and (name not in state.on_host or state.in_use(name)):
            problems.append(f"{path} is on {home}, its matrices on {', '.join(away)}")
    return problems
