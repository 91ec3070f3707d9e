"""A model's record of its adapters: their settings, which are active, which are trained, and where they are.

The record decides, and `apply_state` writes it into the layers; nothing else sets a layer's `active` or `rows`. The
layers are found once and remembered, so switching never walks through the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ...errors import AdapterError, did_you_mean
from ...layers import AdaptedLayer, AdapterModule, Counted, RowAdapters, RowAware
from ..config import LoraConfig
from .wrappers import inner_module, is_peft_model, named_modules, put_module


@dataclass
class AdapterState:
    """The record; it lives on the model, as its attribute `lora_state`.

    Attributes:
        configs: adapter name -> settings, in the order they were attached.
        active: names of the adapters whose updates are added, in order.
        trained: names of the adapters whose parameters get gradients.
        disabled: number of open `disable_adapters` contexts.
        rows: of the open `use_rows` contexts, the innermost last.
        overrides: of the open interventions, the innermost last: module -> active adapter -> the adapter that takes its
            place there, or None.
        on_host: names of the adapters that are kept in host memory while they are not in use.
        homes: the modules that have records in this one's tree; None when it has to be searched.
        modules: the modules that this record governs, found together with `homes`.
        row_aware: those among them that are told which row uses which adapter.
        counted: the number of adapter modules in all models at that time.
    """

    configs: dict[str, LoraConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    disabled: int = 0
    rows: list[RowAdapters] = field(default_factory=list)
    overrides: list[Mapping[AdapterModule, Mapping[str, str | None]]] = field(default_factory=list)
    on_host: set[str] = field(default_factory=set)
    homes: list[nn.Module] | None = None
    modules: list[AdapterModule] = field(default_factory=list)
    row_aware: list[RowAware] = field(default_factory=list)
    counted: int = 0

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


def state_of(home: nn.Module) -> AdapterState:
    """Return the record on this very module; without one it gets an empty one."""
    state = vars(home).get("lora_state")
    if state is None:
        state = home.lora_state = AdapterState()  # type: ignore[assignment]
    assert isinstance(state, AdapterState)
    return state


def homes(model: nn.Module) -> list[nn.Module]:
    """Return the modules that have the records of a model's adapters, in model order; the model itself if none has.

    A record is on the module that add_adapter was called with, without what wraps it. That may be a part of the model,
    and several parts may have their own. A record governs its module's tree but for the trees of records further in.

    Raises:
        AdapterError: the model is one of PEFT, or a layer in it carries an adapter that its record does not have: the
            record is on a module around the model, or the layer came from another model.
    """
    model = inner_module(model)
    state = vars(model).get("lora_state")
    if state is not None and state.homes is not None and state.counted == Counted.made:
        known: list[nn.Module] = state.homes
        return known
    if is_peft_model(model):
        raise AdapterError(
            f"this is PEFT's {type(model).__name__}. Save its adapter with save_pretrained(folder), take its base "
            "model with unload(), and load the adapter into that with load_adapter(base, folder)"
        )
    found = {path: module for path, module in named_modules(model) if _is_home(module)}
    for path, module in named_modules(model):
        if isinstance(module, AdapterModule):
            around = [home for home in found if not home or path == home or path.startswith(f"{home}.")]
            configs = state_of(found[around[-1]]).configs if around else {}
            if unknown := [name for name in module.names() if name not in configs]:
                raise AdapterError(
                    f"{path or 'the module'} carries the adapter '{unknown[0]}', which the record of this model does "
                    "not have: call this with the model that add_adapter was called with, or, if the layer was taken "
                    "from another model, remove the adapter there first"
                )
    result = list(found.values()) or [model]
    if result[0] is model:
        state_of(model).homes = result
        _find_modules(model, result)
    return result


def _is_home(module: nn.Module) -> bool:
    state = vars(module).get("lora_state")
    is_in_use = state is not None and bool(state.configs or state.disabled or state.rows or state.overrides)
    return is_in_use or "lora_merged" in vars(module)


def home_of(model: nn.Module, name: str | Sequence[str] | None = None) -> nn.Module:
    """Return the module that has the record of a model's adapters, or of the adapters with these names.

    Raises:
        AdapterError: there is no such adapter, or several parts of the model have their own; or as `homes`.
    """
    found = homes(model)
    wanted = () if name is None else checked_names(model, name)
    having = [home for home in found if all(one in state_of(home).configs for one in wanted)]
    if len(having) == 1:
        return having[0]
    paths = {module: path for path, module in named_modules(model)}
    parts = ", ".join(f"{paths[home] or 'the whole'} ({', '.join(state_of(home).configs)})" for home in having or found)
    raise AdapterError(f"parts of the model have adapters of their own: {parts}; call this with one of them")


def home_for_new(model: nn.Module) -> nn.Module:
    """Return the module whose record a new adapter of a model enters: the model's own, or that of all its parameters.

    Raises:
        AdapterError: only parts of the model have records; or as `homes`.
    """
    inner, found = inner_module(model), homes(model)
    for path, module in named_modules(inner):
        if type(module).__module__.startswith("peft.tuners"):
            raise AdapterError(
                f"PEFT has put an adapter into this model: {path} is its {type(module).__name__}. Take it out with "
                "PEFT's unload(), or load the model again"
            )
    if found == [inner]:
        return inner
    parts = [home for home in found if home is not inner]
    if len(found) == 1 and {*map(id, inner.parameters())} <= {*map(id, found[0].parameters())}:
        return found[0]
    paths = {module: path for path, module in named_modules(inner)}
    listed = ", ".join(f"{paths[home]} ({', '.join(state_of(home).configs)})" for home in parts)
    raise AdapterError(
        f"parts of the model have adapters of their own: {listed}; remove these before you attach one to the whole, or "
        "attach new ones to the parts"
    )


def adapter_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """Return the model's adapters, name -> config; the dict lives on the model, unless several parts have their own."""
    found = homes(model)
    if len(found) == 1:
        return state_of(found[0]).configs
    configs: dict[str, LoraConfig] = {}
    for home in found:
        configs |= {name: one for name, one in state_of(home).configs.items() if name not in configs}
    return configs


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
    """Return the modules that hold adapters, path -> module: all of them, or those that carry adapter `name`.

    Paths are those of the model without wrappers. If the model has a record, modules that another one governs are left
    out.
    """
    inner = inner_module(model)
    left_out = [one for _, one in named_modules(inner) if one is not inner and _is_home(one)] if _is_home(inner) else []
    return {
        path: module
        for path, module in named_modules(model, left_out)
        if isinstance(module, AdapterModule) and (name is None or name in module.names())
    }


def lora_layers(model: nn.Module, name: str | None = None) -> dict[str, AdaptedLayer]:
    """Return the layers with low-rank updates, path -> layer: all of them, or those that carry adapter `name`."""
    modules = adapter_modules(model, name).items()
    return {path: module for path, module in modules if isinstance(module, AdaptedLayer)}


def known_modules(home: nn.Module, name: str | None = None) -> list[AdapterModule]:
    """Return the modules that a record governs, from memory; they are searched again after any was made or replaced."""
    state = state_of(home)
    if state.homes is None or state.counted != Counted.made:
        _find_modules(home, [module for _, module in named_modules(home) if _is_home(module)])
    return [module for module in state.modules if name is None or name in module.names()]


def _find_modules(home: nn.Module, found: list[nn.Module]) -> None:
    """Remember the modules that a record governs; `found` are the homes in its tree."""
    state = state_of(home)
    modules = [module for _, module in named_modules(home, [other for other in found if other is not home])]
    state.modules = [module for module in modules if isinstance(module, AdapterModule)]
    state.row_aware = [module for module in modules if isinstance(module, RowAware)]
    state.homes, state.counted = found or [home], Counted.made


def replace_module(home: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model holds `old`, since several parents may share a layer."""
    state_of(home).homes = None
    for parent in list(home.modules()):
        for key, child in list(parent._modules.items()):
            if child is old and parent is not new:
                put_module(parent, key, new)


def forget_adapter(home: nn.Module, name: str) -> AdapterRecord:
    """Delete an adapter that the layers no longer carry from the record, and return its entry."""
    state = state_of(home)
    position = state.active.index(name) if name in state.active else None
    record = AdapterRecord(state.configs.pop(name), position, name in state.trained, name in state.on_host)
    state.active = tuple(other for other in state.active if other != name)
    state.trained = tuple(other for other in state.trained if other != name)
    state.on_host.discard(name)
    apply_state(home)
    return record


def recall_adapter(home: nn.Module, name: str, record: AdapterRecord) -> None:
    """Put an adapter that the layers carry again back into the record."""
    state = state_of(home)
    state.configs[name] = record.config
    if record.position is not None:
        state.active = (*state.active[: record.position], name, *state.active[record.position :])
    state.trained += (name,) if record.trained else ()
    state.on_host.update([name] if record.on_host else [])
    apply_state(home)


def check_not_in_a_row(home: nn.Module, name: str) -> None:
    """Raise AdapterError if an open `use_rows` context has assigned an adapter to a row."""
    if any(name in rows.adapters for rows in state_of(home).rows):
        raise AdapterError(f"adapter '{name}' is in use by a row; leave use_rows before you remove or merge it")


def apply_state(home: nn.Module) -> None:
    """Make the layers compute as the record says."""
    state = state_of(home)
    modules = known_modules(home)  # finds the row-aware modules too
    rows = state.rows[-1] if state.rows and not state.disabled else None
    active = state.active if rows is None and not state.disabled else ()
    for module in modules:
        names = active
        for override in state.overrides:
            names = tuple(new for name in names if (new := override.get(module, {}).get(name, name)) is not None)
        module.active = tuple(name for name in dict.fromkeys(names) if name in module.names())
    for row_aware in state.row_aware:
        row_aware.rows = rows
