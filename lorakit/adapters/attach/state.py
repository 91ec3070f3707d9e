"""A model's record of its adapters: their settings, which are active, which are trained, and where they are.

The record decides, and `apply_state` writes it into the layers; nothing else sets a layer's `active` or `rows`. The
layers are found once and remembered, so switching never walks through the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ...errors import AdapterError, did_you_mean
from ...layers import AdaptedLayer, AdapterModule, RowAdapters, RowAware
from ..config import LoraConfig


@dataclass
class AdapterState:
    """The record; it lives on the model.

    Attributes:
        configs: adapter name -> settings, in the order they were attached.
        active: names of the adapters whose updates are added, in order.
        trained: names of the adapters whose parameters get gradients.
        disabled: number of open `disable_adapters` contexts.
        rows: of the open `use_rows` contexts, the innermost last.
        overrides: of the open interventions, the innermost last: module -> active adapter -> the adapter that takes its
            place there, or None.
        on_host: names of the adapters that are kept in host memory while they are not in use.
        modules: the modules that hold adapters; None when the model has to be searched for them.
        row_aware: the modules that are told which row uses which adapter; found together with `modules`.
    """

    configs: dict[str, LoraConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    disabled: int = 0
    rows: list[RowAdapters] = field(default_factory=list)
    overrides: list[Mapping[AdapterModule, Mapping[str, str | None]]] = field(default_factory=list)
    on_host: set[str] = field(default_factory=set)
    modules: list[AdapterModule] | None = None
    row_aware: list[RowAware] = field(default_factory=list)

    def in_use(self, name: str) -> bool:
        """Return whether an adapter is active or used by a row; adapters that are disabled for now count too."""
        return name in self.active or any(name in rows.adapters for rows in self.rows)


@dataclass(frozen=True)
class AdapterRecord:
    """The record's entry of an adapter that was removed.

    Attributes:
        config: its settings.
        position: among the active adapters, or None if it was not active.
        trained, on_host: whether it was trained, and kept in host memory.
    """

    config: LoraConfig
    position: int | None
    trained: bool
    on_host: bool


def state_of(model: nn.Module) -> AdapterState:
    """Return the record of a model's adapters; a module that wraps the model has the record of that model."""
    if not hasattr(model, "lora_state"):
        for inner in model.modules():
            if isinstance(inner_state := vars(inner).get("lora_state"), AdapterState):
                return inner_state
        model.lora_state = AdapterState()  # type: ignore[assignment]
    state: AdapterState = model.lora_state  # type: ignore[assignment]
    return state


def adapter_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """Return the model's adapters, name -> config; the dict lives on the model."""
    return state_of(model).configs


def check_adapter(model: nn.Module, name: str) -> None:
    """Raise AdapterError unless the model has adapter `name`; the error names the nearest one."""
    names = adapter_configs(model)
    if name not in names:
        known = ", ".join(names) or "none"
        raise AdapterError(f"the model has no adapter '{name}'{did_you_mean(name, names)} (attached: {known})")


def checked_names(model: nn.Module, name: str | Sequence[str]) -> tuple[str, ...]:
    """Return one name, or several, as a tuple without repetitions.

    Raises:
        AdapterError: the model has no adapter of such a name.
    """
    names = (name,) if isinstance(name, str) else tuple(dict.fromkeys(name))
    for adapter in names:
        check_adapter(model, adapter)
    return names


def adapter_modules(model: nn.Module, name: str | None = None) -> dict[str, AdapterModule]:
    """Return the modules that hold adapters, path -> module: all of them, or those that carry adapter `name`."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, AdapterModule) and (name is None or name in module.names())
    }


def lora_layers(model: nn.Module, name: str | None = None) -> dict[str, AdaptedLayer]:
    """Return the layers with low-rank updates, path -> layer: all of them, or those that carry adapter `name`."""
    modules = adapter_modules(model, name).items()
    return {path: module for path, module in modules if isinstance(module, AdaptedLayer)}


def known_modules(model: nn.Module, name: str | None = None) -> list[AdapterModule]:
    """Return the modules of `adapter_modules` from memory; the model is searched again after a module was replaced."""
    state = state_of(model)
    if state.modules is None:
        state.modules = [module for module in model.modules() if isinstance(module, AdapterModule)]
        state.row_aware = [module for module in model.modules() if isinstance(module, RowAware)]
    return [module for module in state.modules if name is None or name in module.names()]


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model holds `old`, since several parents may share a layer."""
    state_of(model).modules = None
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old and parent is not new:
                setattr(parent, key, new)


def forget_adapter(model: nn.Module, name: str) -> AdapterRecord:
    """Delete an adapter that the layers no longer carry from the record, and return its entry."""
    state = state_of(model)
    position = state.active.index(name) if name in state.active else None
    record = AdapterRecord(state.configs.pop(name), position, name in state.trained, name in state.on_host)
    state.active = tuple(other for other in state.active if other != name)
    state.trained = tuple(other for other in state.trained if other != name)
    state.on_host.discard(name)
    apply_state(model)
    return record


def recall_adapter(model: nn.Module, name: str, record: AdapterRecord) -> None:
    """Put an adapter that the layers carry again back into the record."""
    state = state_of(model)
    state.configs[name] = record.config
    if record.position is not None:
        state.active = (*state.active[: record.position], name, *state.active[record.position :])
    state.trained += (name,) if record.trained else ()
    state.on_host.update([name] if record.on_host else [])
    apply_state(model)


def check_not_in_a_row(model: nn.Module, name: str) -> None:
    """Raise AdapterError if an open `use_rows` context has assigned an adapter to a row."""
    if any(name in rows.adapters for rows in state_of(model).rows):
        raise AdapterError(f"adapter '{name}' is in use by a row; leave use_rows before you remove or merge it")


def apply_state(model: nn.Module) -> None:
    """Make the layers compute as the record says."""
    state = state_of(model)
    modules = known_modules(model)  # finds the row-aware modules too
    rows = state.rows[-1] if state.rows and not state.disabled else None
    active = state.active if rows is None and not state.disabled else ()
    for module in modules:
        names = active
        for override in state.overrides:
            names = tuple(new for name in names if (new := override.get(module, {}).get(name, name)) is not None)
        module.active = tuple(name for name in dict.fromkeys(names) if name in module.names())
    for row_aware in state.row_aware:
        row_aware.rows = rows
