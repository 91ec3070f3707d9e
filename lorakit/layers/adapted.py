"""What every adapted module shares: the frozen module inside it, its named adapters, and which of them are active."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from .dropout import dropout
from .rows import TakesRows
from .variants import VARIANTS, KeptGain, Variant


class AdapterPart(TakesRows, nn.Module):
    """A module that stands in the place of a frozen one and holds, for each adapter, what is to be trained of it.

    Attributes:
        base_layer: the module whose place it took; its bytes are never changed.
        active: names of the adapters that take part in forward, in order.
    """

    base_layer: nn.Module
    active: tuple[str, ...]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.active = ()

    def names(self) -> list[str]:
        """The adapters that this module carries, in the order they came."""
        raise NotImplementedError

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """What an adapter trains here: name of the table -> parameter."""
        raise NotImplementedError

    def supports_rows(self, name: str) -> bool:
        """Whether an adapter may be that of some rows only (`lorakit.layers.rows`)."""
        return False

    def remove(self, name: str) -> None:
        """Detach an adapter."""
        raise NotImplementedError

    def table(self, name: str) -> nn.ParameterDict:
        """Return a table of parameters, adapter name -> parameter, such as "lora_B"; made where it is new."""
        if name not in self._modules:
            self.add_module(name, nn.ParameterDict())
        return cast(nn.ParameterDict, self._modules[name])

    def _carries(self, table: str, name: str) -> bool:
        return table in self._modules and name in self.table(table)

    def _drop(self, table: str, name: str) -> None:
        """Take an adapter's parameter out of a table, and the table away with its last."""
        del self.table(table)[name]
        if not len(self.table(table)):
            del self._modules[table]


class AdaptedLayer(AdapterPart):
    """A frozen layer plus named low-rank updates of its weight (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    With the weight as a matrix W (out_features, in_features), whatever shape the layer keeps it in, an adapter is

        W + scaling * B @ A

    and its variant (`lorakit.layers.variants`) may do more with it, as DoRA's magnitudes do. The updates of all active
    adapters are summed. A and B are fp32 masters by default; products run in the dtype of the layer's input.

    Attributes:
        lora_A, lora_B: adapter name -> A (r, in_features) and B (out_features, r), as this kind of layer shapes them.
        scaling, dropout_p: adapter name -> factor on B @ A, dropout on the adapter's input.
        variants: adapter name -> how its update enters.
    """

    matrices = ("lora_A", "lora_B")  # what the tables are called in the module's state

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = in_features, out_features
        for table in self.matrices:
            setattr(self, table, nn.ParameterDict())
        self.scaling: dict[str, float] = {}
        self.dropout_p: dict[str, float] = {}
        self.variants: dict[str, Variant] = {}
        self.kept_gains: dict[str, KeptGain] = {}  # of the variants, between forwards without gradient

    @property
    def lora_A(self) -> nn.ParameterDict:
        """Adapter name -> A."""
        return cast(nn.ParameterDict, self._modules[self.matrices[0]])

    @property
    def lora_B(self) -> nn.ParameterDict:
        """Adapter name -> B."""
        return cast(nn.ParameterDict, self._modules[self.matrices[1]])

    # ---- what each kind of layer says of itself ----------------------------------------------------------------------

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether this class is the one that adapts a module."""
        raise NotImplementedError

    def matrix_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at rank r."""
        return (r, self.in_features), (self.out_features, r)

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the base weight in the shape the layer keeps it in, dense (dequantized where it is 4-bit)."""
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
        """Return what the layer would with B @ A in the place of its weight and no bias."""
        raise NotImplementedError

    def along_output(self, vector: Tensor) -> Tensor:
        """Return a vector (out_features,) in a shape that broadcasts over the layer's output."""
        return vector

    # ---- adapters ----------------------------------------------------------------------------------------------------

    def shapes(self, r: int, variant: Variant, bias: bool = False) -> dict[str, tuple[int, ...]]:
        """Return what `add` will train: name of the table -> shape."""
        of_bias = {"trained_bias": (self.out_features,)} if bias and self.base_bias is not None else {}
        return dict(zip(self.matrices, self.matrix_shapes(r), strict=True)) | variant.shapes(self) | of_bias

    def add(
        self,
        name: str,
        r: int,
        scaling: float,
        dropout_p: float = 0.0,
        init: bool = True,
        dtype: torch.dtype = torch.float32,
        variant: Variant = VARIANTS["plain"],
        bias: bool = False,
    ) -> None:
        """Attach an adapter of rank r, initialised so that (unless init is False) it changes nothing yet.

        A is uniform within 1 / sqrt(in_features) (Kaiming with a = sqrt(5), as in the paper's code); B is zero.
        init=False makes B random as well, for tests of file formats. `lorakit.adapters.inits` has other starts.

        Args:
            bias: train a copy of the layer's bias too, where it has one.
        """
        device = next(self.base_layer.parameters()).device
        lora_a, lora_b = (torch.zeros(shape, device=device) for shape in self.matrix_shapes(r))
        self._draw(lora_a, lora_b, init)
        self.lora_A[name], self.lora_B[name] = nn.Parameter(lora_a.to(dtype)), nn.Parameter(lora_b.to(dtype))
        self.scaling[name], self.dropout_p[name], self.variants[name] = scaling, dropout_p, variant
        self.restart(name)
        if bias and self.base_bias is not None:
            self.table("trained_bias")[name] = nn.Parameter(self.base_bias.detach().to(dtype, copy=True))

    def restart(self, name: str) -> None:
        """Give the variant's parameters their first values, for the A and B that there are now."""
        for table, value in self.variants[name].start(self, name).items():
            self.table(table)[name] = nn.Parameter(value, requires_grad=table in self.variants[name].trained)

    def _draw(self, lora_a: Tensor, lora_b: Tensor, init: bool) -> None:
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))

    @property
    def base_bias(self) -> Tensor | None:
        """The base layer's bias, (out_features,), or None."""
        return getattr(self.base_layer, "bias", None)

    def names(self) -> list[str]:
        return list(self.scaling)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        tables = [*self.matrices, *self.variants[name].trained]
        if self._carries("trained_bias", name):
            tables.append("trained_bias")
        return {table: cast(nn.Parameter, self.table(table)[name]) for table in tables}

    def remove(self, name: str) -> None:
        for table in (*self.variants[name].trained, *self.variants[name].kept):
            self._drop(table, name)
        if self._carries("trained_bias", name):
            self._drop("trained_bias", name)
        for values in (self.lora_A, self.lora_B, self.scaling, self.dropout_p, self.variants):
            del values[name]
        self.kept_gains.pop(name, None)
        self.active = tuple(other for other in self.active if other != name)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the low-rank update as (up, down), the scaling in `up`: (out_features, k) and (k, in_features).

        All of it but DoRA's magnitudes, which are not low-rank. k is r, or more where the adapter started elsewhere
        than at the base.
        """
        return self.variants[name].factors(self, name)

    def delta_weight(self, name: str) -> Tensor:
        """Return the change of the base weight that an adapter means, dense, in the base weight's shape."""
        return self.as_weight(self.variants[name].delta(self, name))

    def delta_bias(self, name: str) -> Tensor | None:
        """Return the change of the bias that an adapter means, (out_features,), or None."""
        change = self.variants[name].offset(self, name)
        if self._carries("trained_bias", name):
            own = self.table("trained_bias")[name] - cast(Tensor, self.base_bias)
            change = own if change is None else change + own
        return change

    def has_offset(self, name: str) -> bool:
        """Whether an adapter changes the bias."""
        return self._carries("trained_bias", name) or self.variants[name].offset(self, name) is not None

    def supports_rows(self, name: str) -> bool:
        return True

    def drop_rate(self, name: str) -> float:
        """Return the probability with which numbers of an adapter's input are dropped now: 0 but in training."""
        return self.dropout_p[name] if self.training else 0.0

    # ---- forward, written out: what a fused function of a layer has to equal -----------------------------------------

    def with_updates(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y = base_layer(x) with the updates of the active adapters added."""
        result = y
        for name in self.active:
            rate = self.drop_rate(name)
            dropped = dropout(x, rate) if rate else x
            update = self.variants[name].update(self, name, dropped).to(y.dtype)
            gain = self.variants[name].gain(self, name, x.dtype)
            if gain is not None:  # and here dropout is on the whole product, not on the update alone
                product = self.base_layer(dropped) if rate else y
                if self.base_bias is not None:
                    product = product - self.along_output(self.base_bias).to(y.dtype)
                update = (
                    self.along_output(gain - 1).to(y.dtype) * product + self.along_output(gain).to(y.dtype) * update
                )
            result = result + update
            offset = self.delta_bias(name)
            if offset is not None:
                result = result + self.along_output(offset).to(y.dtype)
        return result

    def extra_repr(self) -> str:
        """Show the adapters when the layer is printed."""
        ranks = ", ".join(f"{name}: r={len(a)}, scaling={self.scaling[name]:g}" for name, a in self.lora_A.items())
        return f"{{{ranks}}}, active={list(self.active)}"
