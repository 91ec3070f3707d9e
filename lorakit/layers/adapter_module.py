"""The base classes of the modules that adapters put in place of frozen ones: how they answer for what they replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from .frozen.calls import is_dense, present
from .frozen.updated_weight import UpdatedWeight
from .row_adapters import RowAware
from .variants import VARIANTS, AttachedAdapter, Variant


class AdapterParameters(Mapping[str, nn.Parameter]):
    """The parameters of one adapter, table -> parameter, read from the module's own tables.

    PyTorch moves, shards and replaces the parameters of a module's tables, so a second reference would become stale.
    """

    def __init__(self, module: AdapterModule, name: str) -> None:
        self._module, self._name = module, name

    def __getitem__(self, table: str) -> nn.Parameter:
        try:
            return cast(nn.Parameter, present(cast(nn.Module, self._module._modules[table]), self._name))
        except AttributeError:
            raise KeyError(table) from None

    def __iter__(self) -> Iterator[str]:
        tables = self._module._modules.items()
        return (name for name, table in tables if isinstance(table, nn.ParameterDict) and self._name in table)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Scalings(Mapping[str, float]):
    """Adapter name -> scaling, read from and written to a layer's records."""

    def __init__(self, adapters: dict[str, AttachedAdapter]) -> None:
        self._adapters = adapters

    def __getitem__(self, name: str) -> float:
        return self._adapters[name].scaling

    def __setitem__(self, name: str, scaling: float) -> None:
        self._adapters[name].scaling = scaling

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)


@dataclass(frozen=True)
class AdapterSpec:
    """A new adapter of a layer.

    Attributes:
        r: rank.
        scaling: factor on B @ A.
        dropout_p: probability of dropping an element of the adapter's input in training.
        variant: how the update enters the layer.
        bias: train a copy of the layer's bias too, if it has one.
        neutral_start: start with an update of zero. Otherwise B is random like A, for tests of file formats.
    """

    r: int
    scaling: float
    dropout_p: float = 0.0
    variant: Variant = VARIANTS["plain"]
    bias: bool = False
    neutral_start: bool = True


class Counted(nn.Module):
    """Base class of modules that lists of a model's modules have to take in.

    Attributes:
        made: how many were made or copied so far, in all models. While it stays the same, such a list stays right.
    """

    made: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        Counted.made += 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        Counted.made += 1  # by copy.deepcopy, for instance


class AdapterModule(RowAware, Counted):
    """A module that replaces a frozen one and holds the parameters of each adapter.

    It answers for the module that it replaces: attributes that it does not have itself, such as `out_features` or
    `padding_idx`, are those of the frozen one. `detach` returns everything that the module holds of one adapter as a
    record. The record can be attached again, to this module or to one like it.

    Attributes:
        base_layer: the replaced module; its bytes are never changed.
        active: names of the adapters that take part in forward, in order.
        path: of the module in the model, for messages; "" if nobody has said it.
    """

    base_layer: nn.Module
    active: tuple[str, ...]
    _tied_weights_keys: ClassVar = {"base_layer": ""}  # transformers may leave these out of a file if others share them

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.training = base_layer.training
        self.base_layer = base_layer
        self.active = ()
        self.path = ""

    def names(self) -> list[str]:
        """Return the names of the adapters on this module, in the order they were attached."""
        raise NotImplementedError

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """Return the parameters that an adapter trains here: table name -> parameter."""
        raise NotImplementedError

    def held_by(self, name: str) -> list[nn.Parameter]:
        """Return all parameters that this module holds of an adapter, trained or not."""
        return list(self.parameters_of(name).values())

    def supports_rows(self, name: str) -> bool:
        """Return whether an adapter can apply to some rows of a batch only (`lorakit.layers.row_adapters`)."""
        return False

    def attach(self, name: str, record: Any) -> None:
        """Attach an adapter from a record that `detach` of such a module returned. Its parameters are not copied."""
        raise NotImplementedError

    def detach(self, name: str) -> Any:
        """Remove an adapter and return the record of everything that this module held of it."""
        raise NotImplementedError

    def table(self, name: str) -> nn.ParameterDict:
        """Return the table of this name, such as "lora_B": adapter name -> parameter. A new table is created."""
        if name not in self._modules:
            setattr(self, name, nn.ParameterDict().train(self.training))
        return cast(nn.ParameterDict, self._modules[name])

    def set_mode(self, training: bool) -> None:
        """Put this module and what it holds of adapters into training or evaluation mode, but not its base layer."""
        self.training = training
        for key, child in self._modules.items():
            if key != "base_layer" and child is not None:
                child.train(training)

    def forget_base(self) -> None:
        """Drop everything that was computed from the base weight, for instance before it is replaced."""

    @property
    def device(self) -> torch.device:
        """The base layer's device while it computes."""
        name, parameter = next(self.base_layer.named_parameters())
        return parameter.device if "." in name else present(self.base_layer, name).device

    @property
    def label(self) -> str:
        """Name this module in a message: its path and the class of its base layer."""
        kind = type(self.base_layer).__name__
        return f"{self.path}, a {kind}" if self.path else f"a {kind}"

    def _pop_parameter(self, table: str, name: str) -> nn.Parameter:
        """Remove an adapter's parameter from a table and return it."""
        return cast(nn.Parameter, self.table(table).pop(name))

    def _deactivate(self, name: str) -> None:
        self.active = tuple(other for other in self.active if other != name)

    # ---- answering for the base layer --------------------------------------------------------------------------------

    def answer(self, name: str) -> Any:
        """Return a public attribute of the module that this one replaces."""
        return getattr(self.base_layer, name)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        # Private names of one object are its own. Accelerate, for example, keeps the forward that it patched in one.
        if "base_layer" in modules and (name[:1] != "_" or _has_method(modules["base_layer"], name)):
            return self.answer(name)
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Set a parameter of the base layer: this is what `head.weight = embedding.weight` means, for instance."""
        self.forget_base()
        setattr(self.base_layer, name, param)

    # ---- when PyTorch changes the base weight ------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.forget_base()  # `.to(torch.bfloat16)` rounds the base weight
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget_base()  # `load_state_dict` calls this before it overwrites the base weight
        super()._load_from_state_dict(*args)


class WeightUpdater(AdapterModule):
    """A module whose adapters change one weight of its base layer, also for whoever reads that weight.

    Attributes:
        parameter: name of the weight in the base layer.
    """

    parameter = "weight"

    def delta_weight(self, name: str) -> Tensor:
        """Return an adapter's change of the base weight, dense, in the base weight's shape."""
        raise NotImplementedError

    def delta_bias(self, name: str) -> Tensor | None:
        """Return an adapter's change of the bias, (out_features,), or None."""
        return None

    def drop_rate(self, name: str) -> float:
        """Return the current probability of dropping an element of an adapter's input: 0 outside training."""
        return 0.0

    def frozen_weight(self) -> Tensor:
        """Return the weight that the adapters change, in the base layer's own shape."""
        return present(self.base_layer, self.parameter)

    def updated_weight(self) -> Tensor:
        """Return the weight with the updates of the active adapters, in its own shape and dtype, differentiable.

        Raises:
            AdapterError: the base layer keeps codes instead of a weight, or adapters do not change the weight alone.
        """
        weight = self.frozen_weight()
        if self.rows is not None or not is_dense(weight):
            why = "to whose codes an update cannot be added" if self.rows is None else "the same for all rows"
            raise AdapterError(f"{self.label}: the model takes its weight, {why}; leave it out with exclude_modules")
        if any(self.drop_rate(name) for name in self.active):
            raise AdapterError(
                f"{self.label}: the model takes its weight instead of calling the layer, so lora_dropout cannot drop "
                "elements of its input; set lora_dropout to 0, or leave the layer out with exclude_modules"
            )
        change = torch.stack([self.delta_weight(name) for name in self.active]).sum(0)
        return (weight.to(torch.promote_types(weight.dtype, change.dtype)) + change).to(weight.dtype)

    def updated_bias(self) -> Tensor | None:
        """Return the bias with the changes of the active adapters, (out_features,), or None."""
        bias: Tensor | None = super().answer("bias")
        names = self.active if self.rows is None else [name for name in self.rows.adapters if name in self.names()]
        changes = cast(list[Tensor], list(filter(lambda change: change is not None, map(self.delta_bias, names))))
        if not changes:
            return bias
        if self.rows is not None:
            raise AdapterError(f"{self.label}: the model takes its bias, the same for all rows")
        total = torch.stack(changes).sum(0)
        return total if bias is None else bias + total.to(bias.dtype)

    def lookup(self, ids: Tensor, padding_idx: int | None = None) -> Tensor | None:
        """Return the rows of the updated weight with these indices, or None if the layer is no embedding.

        Shapes:
            ids (...) int64 -> (..., embedding_dim)
        """
        return None

    @property
    def is_in_use(self) -> bool:
        """Whether an adapter is active here, or used by a row."""
        if self.rows is None:
            return bool(self.active)
        return any(name in self.rows.adapters for name in self.names())

    def read_weight(self) -> Tensor:
        """Return the updated weight in its own shape, computed when it is used (`UpdatedWeight`)."""
        if torch.compiler.is_compiling():  # the compiler drops what is not used by itself
            return self.updated_weight()
        trains = any(parameter.requires_grad for name in self.active for parameter in self.held_by(name))
        return UpdatedWeight(self, self.frozen_weight(), trains)

    def call_with_updated_weight(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the base layer with the updated weight in place of its own, whatever its forward does with a weight."""
        weight = self.base_layer._parameters.get(self.parameter)
        if weight is None or weight.is_meta or not is_dense(weight):
            held = "computes it" if weight is None else f"holds {weight.dtype} on {weight.device}"
            raise AdapterError(
                f"{self.label}: only a layer with a dense weight of its own can compute with an updated one, and this "
                f"one {held}; leave it out with exclude_modules"
            )
        updated = {self.parameter: self.read_weight()}
        if "bias" in self.base_layer._parameters and (bias := self.updated_bias()) is not self.base_layer.bias:
            updated["bias"] = cast(Tensor, bias)
        return torch.func.functional_call(self.base_layer, updated, tuple(args), dict(kwargs))

    def answer(self, name: str) -> Any:
        base = self.base_layer
        if not self.is_in_use:
            return super().answer(name)
        if name == self.parameter:
            return self.read_weight()
        if name == "bias":
            return self.updated_bias()
        if not hasattr(type(base), name) or isinstance(base, AdapterModule):
            return super().answer(name)
        twin = object.__new__(type(base))  # methods and properties of the class may read the weight
        twin.__dict__.update(base.__dict__, **{self.parameter: self.read_weight()})
        return getattr(twin, name)


def _has_method(module: nn.Module, name: str) -> bool:
    return not name.startswith("__") and hasattr(type(module), name)
