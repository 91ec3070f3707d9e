"""The base class of adapted layers: a frozen layer, its named adapters, and which of them are active."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from .adapter_module import AdapterParameters, AdapterSpec, Scalings, WeightUpdater
from .dropout import dropout
from .frozen.calls import has_hooks, has_own_forward, is_dense
from .frozen.values import call_layer, values_of
from .gains import compose
from .variants import AttachedAdapter


class AdaptedLayer(WeightUpdater):
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
            self.table(table)
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
    def scaling(self) -> Scalings:
        """Adapter name -> factor on B @ A."""
        return Scalings(self.adapters)

    # ---- defined by each kind of layer -------------------------------------------------------------------------------

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether this class adapts a module."""
        raise NotImplementedError

    def matrix_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B at rank r."""
        return (r, self.in_features), (self.out_features, r)

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the base weight in the shape the layer keeps it in, dense (dequantized if it is quantized).

        Raises:
            AdapterError: it holds codes of an unknown kind.
        """
        values = values_of(self.base_layer, dtype)
        if values is None:
            raise AdapterError(
                f"{self.label}, keeps its weight as codes of an unknown kind, whose values are not known"
            )
        return values

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor of the base weight's shape as the matrix (out_features, in_features)."""
        return weight.flatten(1)

    def base_rows(self, rows: slice) -> Tensor:
        """Return some rows of the base weight as a matrix, (rows, in_features), in any dtype."""
        weight = self.frozen_weight() if "weight" in self.base_layer._parameters else None
        dense = self.base_weight(torch.float32) if weight is None or not is_dense(weight) else weight.detach()
        return self.as_matrix(dense)[rows]

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

    def made_up_input(self, generator: torch.Generator) -> Tensor:
        """Return a small random input of the layer, fp32, to try it out."""
        raise NotImplementedError

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
        record.parameters = AdapterParameters(self, name)
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

    @property
    def takes_weight(self) -> bool:
        """Whether the base layer's forward gets the updated weight; otherwise the update is added to its output.

        A subclass may do anything with its weight: scale it, shift the positions that it looks up, pad the input.
        """
        return has_own_forward(self.base_layer) and is_dense(self.base_layer._parameters.get("weight"))

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base layer with its arguments, with the updates of the active adapters."""
        if self.active and self.takes_weight:
            return self.call_with_updated_weight(args, kwargs)
        y = call_layer(self.base_layer, *args, **kwargs)
        if not self.active:
            return y
        x = first_argument(args, kwargs)
        return self.with_updates(y, x) if self.is_product(y, x) else self.call_with_updated_weight(args, kwargs)

    def is_product(self, y: object, x: Tensor) -> bool:
        """Return whether an update can be added to the base layer's output y for x."""
        return True

    def with_updates(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y = base_layer(x), of any shape, with the updates of the active adapters added.

        Raises:
            AdapterError: y is no tensor of the update's shape.
        """
        result = y
        is_hooked = has_hooks(self.base_layer)  # y is then what the hooks made of the product
        for name in self.active:
            adapter, rate = self.adapters[name], self.drop_rate(name)
            dropped = dropout(x, rate) if rate else x
            update = adapter.variant.update(self, adapter, dropped)
            if not isinstance(y, Tensor) or y.shape != update.shape:
                raise AdapterError(f"{self.label}, gave no tensor of shape {tuple(update.shape)} to add an update to")
            update, gain = update.to(y.dtype), self.gain(name, self._dtype_for(x))
            if gain is not None:  # with a gain, dropout applies to the whole product, not to the update alone
                product = self._product(dropped) if is_hooked else self.base_layer(dropped) if rate else y
                if self.base_bias is not None and not is_hooked:
                    product = product - self.along_output(self.base_bias).to(y.dtype)
                update = compose(self.along_output(gain), product.to(y.dtype), update)
            result = result + update
            offset = self.delta_bias(name)
            if offset is not None:
                result = result + self.along_output(offset).to(y.dtype)
        return result

    def _product(self, x: Tensor) -> Tensor:
        """Return the base layer's output for x without its bias and hooks."""
        return self.apply_matrix(self.as_matrix(self.base_weight(self._dtype_for(x))), x)

    def _dtype_for(self, x: Tensor) -> torch.dtype:
        """Return the dtype of the products with x; ids have none of their own."""
        return x.dtype if x.is_floating_point() else self.adapters[self.active[0]].lora_A.dtype

    def extra_repr(self) -> str:
        """Show the adapters when the layer is printed."""
        records = self.adapters.items()
        ranks = ", ".join(f"{name}: r={len(record.lora_A)}, scaling={record.scaling:g}" for name, record in records)
        return f"{{{ranks}}}, active={list(self.active)}"


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the input among the arguments of a call."""
    return args[0] if args else next(iter(kwargs.values()))
