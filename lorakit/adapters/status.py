"""`adapter_status`: what is attached, active, trained, merged, and where; and whatever is not as the record says.

The record (`state.py`) is what was asked for. Here the model is gone through and compared with it, because anyone can
change requires_grad flags, layers and devices.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from ..layers import AdaptedLayer, AdapterModule
from .attach.state import adapter_modules, known_modules, state_of
from .attach.switching import idle_adapters
from .merging.swaps import merged_state


@dataclass(frozen=True)
class AdapterSummary:
    """One adapter.

    Attributes:
        name: of the adapter.
        active, trained, merged: whether its update is added, its parameters get gradients, it is part of the weights.
        rows: how many rows use it, within `use_rows`.
        ranks: rank -> number of layers.
        parameters: how many numbers it trains, or would.
        dtypes, devices: of its parameters.
        on_host: whether it waits in host memory while it is not in use.
        irregularities: what is not as it should be.
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
        words = [word for word, is_so in flags.items() if is_so] or ["attached"]
        words += [f"{self.rows} rows"] if self.rows else []
        ranks = ", ".join(f"r={rank} on {count} layers" for rank, count in self.ranks.items())
        where = [", ".join(self.dtypes), ", ".join(self.devices)]
        return "; ".join(part for part in [", ".join(words), ranks, f"{self.parameters:,} parameters", *where] if part)


@dataclass(frozen=True)
class AdapterStatus:
    """All adapters of a model; printed, it is a line for each.

    Attributes:
        adapters: name -> what is known of it.
        disabled: whether a `disable_adapters` context is open.
        also_trained: parameters that get gradients and belong to no adapter.
        irregularities: what is not as it should be, of the model and of each adapter.
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
    """Return what is attached to a model, and whatever of it is not as it was set."""
    state, merged = state_of(model), merged_state(model)
    adapters = {name: _info(model, name) for name in state.configs}
    for name in merged.names if merged else ():
        key = f"{name} (merged)" if name in adapters else name  # whose name a new adapter may have taken
        adapters[key] = AdapterSummary(name, active=False, trained=False, merged=True)
    found, known = adapter_modules(model), known_modules(model)
    problems = [
        f"{path} was not put in by add_adapter: switching does not reach it"
        for path, part in found.items()
        if not any(part is other for other in known)
    ]
    own = {id(p) for part in found.values() for name in part.names() for p in part.parameters_of(name).values()}
    others = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in own)
    problems += [f"{name}: {problem}" for name, info in adapters.items() for problem in info.irregularities]
    return AdapterStatus(adapters, state.disabled > 0, others, problems)


def _info(model: nn.Module, name: str) -> AdapterSummary:
    state = state_of(model)
    parts = adapter_modules(model, name)
    layers = [part for part in parts.values() if isinstance(part, AdaptedLayer)]
    parameters = [p for part in parts.values() for p in part.parameters_of(name).values()]
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
        irregularities=_irregularities(model, name, parts),
    )


def _irregularities(model: nn.Module, name: str, parts: dict[str, AdapterModule]) -> list[str]:
    state = state_of(model)
    is_trained = name in state.trained
    is_active = name in state.active and not state.disabled and not state.rows
    parameters = [p for part in parts.values() for p in part.parameters_of(name).values()]
    flipped = sum(parameter.requires_grad != is_trained for parameter in parameters)
    problems = ["trained, but not active: no gradient reaches it"] if name in idle_adapters(model) else []
    if flipped:
        asked, found = ("trained", "frozen") if is_trained else ("frozen", "trained")
        problems.append(f"set to be {asked}, but {flipped} of its {len(parameters)} parameters are {found}")
    for path, part in parts.items():
        if (name in part.active) != is_active:
            problems.append(f"{path} has it {'in' if is_active else ''}active, unlike the model")
        home = next(part.base_layer.parameters()).device
        away = {str(p.device) for p in part.parameters_of(name).values() if p.device != home}
        if away and (name not in state.on_host or state.in_use(name)):
            problems.append(f"{path} is on {home}, its matrices on {', '.join(away)}")
    return problems
