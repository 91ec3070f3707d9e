"""The base classes of adapted modules: a frozen module, its named adapters, and which of them are active."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .base_changes import Counted, ForgetsBase
from .dropout import dropout
from .gains import compose
from .row_adapters import RowAware
from .variants import VARIANTS, AttachedAdapter, Variant


class AdapterModule(RowAware, Counted, ForgetsBase):
    """A module that replaces a frozen one and holds the parameters of each adapter.

    `detach` returns everything that the module holds of one adapter as a record. The record can be attached again, to
    this module or to one like it.

    Attributes:
        base_layer: the replaced module; its bytes are never changed.
        active: names of the adapters that take part in forward, in order.
    """

    base_layer: nn.Module
    active: tuple[str, ...]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.active = ()

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
            self.add_module(name, nn.ParameterDict())
        return cast(nn.ParameterDict, self._modules[name])

    def _pop_parameter(self, table: str, name: str) -> nn.Parameter:
        """Remove an adapter's parameter from a table and return it."""
        return cast(nn.Parameter, self.table(table).pop(name))

    def _deactivate(self, name: str) -> None:
        self.active = tuple(other for other in self.active if other != name)


class _AdapterParameters(Mapping[str, nn.Parameter]):
    """The parameters of one adapter, table -> parameter, read from the module's own tables.

    PyTorch moves, shards and replaces the parameters of a module's tables, so a second reference would become stale.
    """

    def __init__(self, module: AdapterModule, name: str) -> None:
        self._module, self._name = module, name

    def __getitem__(self, table: str) -> nn.Parameter:
        try:
            return cast(nn.Parameter, getattr(self._module._modules[table], self._name))
        except AttributeError:
            raise KeyError(table) from None

    def __iter__(self) -> Iterator[str]:
        tables = self._module._modules.items()
        return (name for name, table in tables if isinstance(table, nn.ParameterDict) and self._name in table)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Scalings(Mapping[str, float]):
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


class AdaptedLayer(AdapterModule):
    """A frozen layer plus named low-rank updates of its weight (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    Let W (out_features, in_features) be the weight as a matrix, whatever shape the layer keeps it in. An adapter is

        W + scaling * B @ A

    Its variant (`lorakit.layers.variants`) may do more, as DoRA's magnitudes do. The updates of all active adapters are
    summed. A and B are fp32 masters by default; products run in the dtype of the layer's input.

    Attributes:
        adapters: adapter name -> its record.
        lora_A, lora_B: adapter name -> A (r, in_features) and B (out_features, r), as this kind of layer shapes them.
        scaling: adapter name -> factor on B @ A; writable.
        kept_of_base: tensors that variants have computed from the base weight, under names of their own.
    """

    matrices = ("lora_A", "lora_B")  # names of the tables of A and B in the module's state

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = in_features, out_features
        for table in self.matrices:
            setattr(self, table, nn.ParameterDict())
        self.adapters: dict[str, AttachedAdapter] = {}
        self.kept_of_base: dict[str, Tensor] = {}

    @property
    def lora_A(self) -> nn.ParameterDict:
        """Adapter name -> A."""
        return cast(nn.ParameterDict, self._modules[self.matrices[0]])

    @property
    def lora_B(self) -> nn.ParameterDict:
        """Adapter name -> B."""
        return cast(nn.ParameterDict, self._modules[self.matrices[1]])

    @property
    def scaling(self) -> _Scalings:
        """Adapter name -> factor on B @ A."""
        return _Scalings(self.adapters)

    # ---- defined by each kind of layer -------------------------------------------------------------------------------

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether this class adapts a module."""
        raise NotImplementedError

    def matrix_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B at rank r."""
        return (r, self.in_features), (self.out_features, r)

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the base weight in the shape the layer keeps it in, dense (dequantized if it is 4-bit)."""
        return cast(Tensor, self.base_layer.weight).detach().to(dtype)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor of the base weight's shape as the matrix (out_features, in_features)."""
        return weight.flatten(1)

    def base_rows(self, rows: slice) -> Tensor:
        """Return some rows of the base weight as a matrix, (rows, in_features), in any dtype."""
        return self.as_matrix(cast(Tensor, self.base_layer.weight).detach())[rows]

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix (out_features, in_features) in the base weight's shape."""
        return matrix

    def project(self, matrix: Tensor) -> Tensor:
        """Return matrix @ Wᵀ for a few rows: (rows, in_features) -> (rows, out_features), in the dtype of `matrix`."""
        return matrix @ self.as_matrix(self.base_weight(matrix.dtype)).T

    def low_rank(self, lora_a: Tensor, lora_b: Tensor, x: Tensor) -> Tensor:
        """Return the layer's output for x, in the layer's output shape, with B @ A as its weight and no bias."""
        raise NotImplementedError

    def apply_matrix(self, matrix: Tensor, x: Tensor) -> Tensor:
        """Return the layer's output for x with a matrix (out_features, in_features) as its weight and no bias."""
        raise NotImplementedError

    def along_output(self, vector: Tensor) -> Tensor:
        """Return a vector (out_features,) in a shape that broadcasts over the layer's output."""
        return vector

    @property
    def device(self) -> torch.device:
        """The base layer's device."""
        return next(self.base_layer.parameters()).device

    @property
    def has_bias(self) -> bool:
        """Whether the base layer has a `bias` attribute, even if it is None."""
        return hasattr(self.base_layer, "bias")

    @property
    def base_bias(self) -> Tensor | None:
        """The base layer's bias, (out_features,), or None."""
        return getattr(self.base_layer, "bias", None)

    # ---- adapters ----------------------------------------------------------------------------------------------------

    def shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters that `add` will train: table name -> shape."""
        bias = {"trained_bias": (self.out_features,)} if spec.bias and self.base_bias is not None else {}
        matrices = dict(zip(self.matrices, self.matrix_shapes(spec.r), strict=True))
        return matrices | spec.variant.shapes(self) | bias

    def add(self, name: str, spec: AdapterSpec, dtype: torch.dtype = torch.float32) -> None:
        """Attach a new adapter.

        A is uniform within 1 / sqrt(in_features) (Kaiming with a = sqrt(5), as in the paper's code); B is zero.
        `lorakit.adapters.starts` has other starts.

        Args:
            dtype: dtype of its parameters.
        """
        lora_a, lora_b = (torch.zeros(shape, device=self.device) for shape in self.matrix_shapes(spec.r))
        self._draw(lora_a, lora_b, spec.neutral_start)
        pair = dict(zip(self.matrices, (nn.Parameter(lora_a.to(dtype)), nn.Parameter(lora_b.to(dtype))), strict=True))
        self.attach(name, AttachedAdapter(pair, spec.scaling, spec.variant, spec.dropout_p, self.matrices))
        self.restart(name)
        if spec.bias and self.base_bias is not None:
            self.table("trained_bias")[name] = nn.Parameter(self.base_bias.detach().to(dtype, copy=True))

    def restart(self, name: str) -> None:
        """Give the variant's parameters their initial values for the current A and B."""
        adapter = self.adapters[name]
        for table, value in adapter.variant.start(self, adapter).items():
            self.table(table)[name] = nn.Parameter(value, requires_grad=table in adapter.variant.trained)

    def _draw(self, lora_a: Tensor, lora_b: Tensor, neutral_start: bool) -> None:
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        if not neutral_start:
            nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))

    def attach(self, name: str, record: AttachedAdapter) -> None:
        for table, parameter in record.parameters.items():
            self.table(table)[name] = parameter
        record.parameters = _AdapterParameters(self, name)
        self.adapters[name] = record

    def detach(self, name: str) -> AttachedAdapter:
        record = self.adapters.pop(name)
        record.parameters = {table: self._pop_parameter(table, name) for table in list(record.parameters)}
        record.kept_gain = None
        for table in record.parameters:
            if table not in self.matrices and not len(self.table(table)):
                del self._modules[table]
        self._deactivate(name)
        return record

    def forget_base(self) -> None:
        self.kept_of_base.clear()
        for adapter in self.adapters.values():
            adapter.kept_gain = None

    def names(self) -> list[str]:
        return list(self.adapters)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        parameters = self.adapters[name].parameters
        tables = [*self.matrices, *self.adapters[name].variant.trained]
        tables += ["trained_bias"] if "trained_bias" in parameters else []
        return {table: parameters[table] for table in tables}

    def held_by(self, name: str) -> list[nn.Parameter]:
        return list(self.adapters[name].parameters.values())

    # ---- the change that an adapter makes ----------------------------------------------------------------------------

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the low-rank update as (up, down), (out_features, k) and (k, in_features), with the scaling in `up`.

        If the variant `is_low_rank`, this is the whole change. k is r, or more if the adapter did not start at the
        base.
        """
        return self.adapters[name].variant.factors(self.adapters[name])

    def gain(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Return the factor on each row of the adapted weight, (out_features,), or None for 1.

        Args:
            dtype: dtype of the layer's products.
        """
        adapter = self.adapters[name]
        return adapter.variant.gain(self, adapter, dtype)

    def delta_weight(self, name: str) -> Tensor:
        """Return an adapter's change of the base weight, dense, in the base weight's shape."""
        return self.as_weight(self.adapters[name].variant.delta(self, self.adapters[name]))

    def delta_bias(self, name: str) -> Tensor | None:
        """Return an adapter's change of the bias, (out_features,), or None."""
        adapter = self.adapters[name]
        change = adapter.offset
        if "trained_bias" in adapter.parameters:
            trained = adapter.parameters["trained_bias"] - cast(Tensor, self.base_bias)
            change = trained if change is None else change + trained
        return change

    def has_offset(self, name: str) -> bool:
        """Return whether an adapter changes the bias."""
        adapter = self.adapters[name]
        return adapter.variant.has_offset or "trained_bias" in adapter.parameters

    def supports_rows(self, name: str) -> bool:
        return True

    def drop_rate(self, name: str) -> float:
        """Return the current probability of dropping an element of an adapter's input: 0 outside training."""
        return self.adapters[name].dropout_p if self.training else 0.0

    # ---- forward, written out; a layer's fused function must equal it ------------------------------------------------

    def with_updates(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y = base_layer(x), of any shape, with the updates of the active adapters added."""
        result = y
        for name in self.active:
            adapter, rate = self.adapters[name], self.drop_rate(name)
            dropped = dropout(x, rate) if rate else x
            update = adapter.variant.update(self, adapter, dropped).to(y.dtype)
            gain = self.gain(name, x.dtype)
            if gain is not None:  # with a gain, dropout applies to the whole product, not to the update alone
                product = self.base_layer(dropped) if rate else y
                if self.base_bias is not None:
                    product = product - self.along_output(self.base_bias).to(y.dtype)
                update = compose(self.along_output(gain), product, update)
            result = result + update
            offset = self.delta_bias(name)
            if offset is not None:
                result = result + self.along_output(offset).to(y.dtype)
        return result

    def extra_repr(self) -> str:
        """Show the adapters when the layer is printed."""
        records = self.adapters.items()
        ranks = ", ".join(f"{name}: r={len(record.lora_A)}, scaling={record.scaling:g}" for name, record in records)
        return f"{{{ranks}}}, active={list(self.active)}"
