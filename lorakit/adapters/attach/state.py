"""What a model knows of its adapters: their settings, which are active, which are trained, and where they are.

The record is the truth and `apply_state` writes it into the layers; nothing else sets a layer's `active` or `rows`. The
layers are found once and remembered, so that switching never walks through the whole model.
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
    """The record, which lives on the model.

    Attributes:
        configs: adapter name -> settings, in the order they were attached.
        active: names of the adapters whose updates are added, in order.
        trained: names of the adapters whose parameters get gradients.
        disabled: how many `disable_adapters` contexts are open.
        rows: of the `use_rows` contexts that are open, the innermost last.
        overrides: of the open interventions, the innermost last: module -> active adapter -> the adapter that takes its
            place there, or None.
        on_host: names of the adapters that are kept in host memory while they are not in use.
        parts, row_aware: modules of the model that hold adapters, or are told of rows; parts is None where they
            have to be looked for.
    """

    configs: dict[str, LoraConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    disabled: int = 0
    rows: list[RowAdapters] = field(default_factory=list)
    overrides: list[Mapping[AdapterModule, Mapping[str, str | None]]] = field(default_factory=list)
    on_host: set[str] = field(default_factory=set)
    parts: list[AdapterModule] | None = None
    row_aware: list[RowAware] = field(default_factory=list)

    def in_use(self, name: str) -> bool:
        """Whether an adapter is active or some row's; it stays so while adapters are disabled."""
        return name in self.active or any(name in rows.adapters for rows in self.rows)


@dataclass(frozen=True)
class AdapterRecord:
    """What a model knew of an adapter that was taken off.

    Attributes:
        config: its settings.
        place: among the active ones, or None where it was not active.
        trained, on_host: whether it was.
    """

    config: LoraConfig
    place: int | None
    trained: bool
    on_host: bool


def state_of(model: nn.Module) -> AdapterState:
    """Return the record of a model's adapters; of a module that the model was wrapped into since, that of the model."""
    if not hasattr(model, "lora_state"):
        for inner in model.modules():
            if isinstance(found := vars(inner).get("lora_state"), AdapterState):
                return found
        model.lora_state = AdapterState()  # type: ignore[assignment]
    state: AdapterState = model.lora_state  # type: ignore[assignment]
    return state


def adapter_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """Return the model's adapters, name -> config; the dict lives on the model."""
    return state_of(model).configs


def check_adapter(model: nn.Module, name: str) -> None:
    """Raise AdapterError, naming the nearest, unless the model has adapter `name`."""
    names = adapter_configs(model)
    if name not in names:
        known = ", ".join(names) or "none"
        raise AdapterError(f"the model has no adapter '{name}'{did_you_mean(name, names)} (attached: {known})")


def checked_names(model: nn.Module, name: str | Sequence[str]) -> tuple[str, ...]:
    """Return one name, or several, as a tuple without repetitions; all must be adapters of the model.

    Raises:
        AdapterError: there is no adapter of that name.
    """
    names = (name,) if isinstance(name, str) else tuple(dict.fromkeys(name))
    for one in names:
        check_adapter(model, one)
    return names


def adapter_modules(model: nn.Module, name: str | None = None) -> dict[str, AdapterModule]:
    """Return every module that stands in for another, path -> module: all, or those that carry adapter `name`."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, AdapterModule) and (name is None or name in module.names())
    }


def lora_layers(model: nn.Module, name: str | None = None) -> dict[str, AdaptedLayer]:
    """Return the layers with low-rank updates, path -> layer: all of them, or those that carry adapter `name`."""
    return {path: part for path, part in adapter_modules(model, name).items() if isinstance(part, AdaptedLayer)}


def known_modules(model: nn.Module, name: str | None = None) -> list[AdapterModule]:
    """Return what `adapter_modules` returns, remembered since an adapter was last attached or taken off."""
    state = state_of(model)
    if state.parts is None:
        state.parts = [module for module in model.modules() if isinstance(module, AdapterModule)]
        state.row_aware = [module for module in model.modules() if isinstance(module, RowAware)]
    return [part for part in state.parts if name is None or name in part.names()]


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model holds `old`: a layer may be shared by several parents."""
    state_of(model).parts = None
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old and parent is not new:
                setattr(parent, key, new)


def forget_adapter(model: nn.Module, name: str) -> AdapterRecord:
    """Take an adapter, which the layers no longer carry, out of the record; return what the record said of it."""
    state = state_of(model)
    place = state.active.index(name) if name in state.active else None
    record = AdapterRecord(state.configs.pop(name), place, name in state.trained, name in state.on_host)
    state.active = tuple(other for other in state.active if other != name)
    state.trained = tuple(other for other in state.trained if other != name)
    state.on_host.discard(name)
    apply_state(model)
    return record


def recall_adapter(model: nn.Module, name: str, record: AdapterRecord) -> None:
    """Put an adapter, which the layers carry again, back into the record."""
    state = state_of(model)
    state.configs[name] = record.config
    if record.place is not None:
        state.active = (*state.active[: record.place], name, *state.active[record.place :])
    state.trained += (name,) if record.trained else ()
    state.on_host.update([name] if record.on_host else [])
    apply_state(model)


def check_not_in_a_row(model: nn.Module, name: str) -> None:
    """Raise AdapterError where a `use_rows` context that is open has given an adapter to a row."""
    if any(name in rows.adapters for rows in state_of(model).rows):
        raise AdapterError(f"adapter '{name}' is in use by a row; leave use_rows before it is taken off")


def apply_state(model: nn.Module) -> None:
    """Make the layers compute what the record says."""
    state = state_of(model)
    parts = known_modules(model)
    rows = state.rows[-1] if state.rows and not state.disabled else None
    active = state.active if rows is None and not state.disabled else ()
    for part in parts:
        names = active
        for change in state.overrides:
            names = tuple(new for name in names if (new := change.get(part, {}).get(name, name)) is not None)
        part.active = tuple(name for name in dict.fromkeys(names) if name in part.names())
    for module in state.row_aware:
        module.rows = rows
