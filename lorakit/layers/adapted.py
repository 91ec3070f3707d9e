"""What every adapted module shares: the frozen module inside it, its named adapters, and which of them are active."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from .variants import VARIANTS, Variant


class AdapterPart(nn.Module):
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

    def remove(self, name: str) -> None:
        """Detach an adapter."""
        raise NotImplementedError


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

    @property
    def lora_A(self) -> nn.ParameterDict:
        """Adapter name -> A."""
        return cast(nn.ParameterDict, self._modules[self.matrices[0]])

    @property
    def lora_B(self) -> nn.ParameterDict:
        """Adapter name -> B."""
        return cast(nn.ParameterDict, self._modules[self.matrices[1]])

    # ---- what each kind of layer says of itself ----------------------------------------------------------------------

    def shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at rank r."""
        return (r, self.in_features), (self.out_features, r)

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the base weight in the shape the layer keeps it in, dense (dequantized where it is 4-bit)."""
        return cast(Tensor, self.base_layer.weight).detach().to(dtype)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor of the base weight's shape as the matrix (out_features, in_features)."""
        return weight.reshape(self.out_features, -1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix (out_features, in_features) in the base weight's shape."""
        return matrix

    def project(self, matrix: Tensor) -> Tensor:
        """Return matrix @ Wᵀ for a few rows: (rows, in_features) -> (rows, out_features), in the dtype of `matrix`."""
        return matrix @ self.as_matrix(self.base_weight(matrix.dtype)).T

    # ---- adapters ----------------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        r: int,
        scaling: float,
        dropout_p: float = 0.0,
        init: bool = True,
        dtype: torch.dtype = torch.float32,
        variant: Variant = VARIANTS["plain"],
    ) -> None:
        """Attach an adapter of rank r, initialised so that (unless init is False) it changes nothing yet.

        A is uniform within 1 / sqrt(in_features) (Kaiming with a = sqrt(5), as in the paper's code); B is zero.
        init=False makes B random as well, for tests of file formats. `lorakit.adapters.inits` has other starts.
        """
        device = next(self.base_layer.parameters()).device
        of_a, of_b = self.shapes(r)
        lora_a, lora_b = torch.empty(of_a, device=device), torch.zeros(of_b, device=device)
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))
        self.lora_A[name], self.lora_B[name] = nn.Parameter(lora_a.to(dtype)), nn.Parameter(lora_b.to(dtype))
        self.scaling[name], self.dropout_p[name], self.variants[name] = scaling, dropout_p, variant
        for table, value in variant.start(self, name).items():
            self.table(table)[name] = nn.Parameter(value)

    def table(self, name: str) -> nn.ParameterDict:
        """Return a variant's table of further parameters, such as "lora_magnitude_vector"; made where it is new."""
        if name not in self._modules:
            self.add_module(name, nn.ParameterDict())
        return cast(nn.ParameterDict, self._modules[name])

    def names(self) -> list[str]:
        return list(self.scaling)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        tables = (*self.matrices, *self.variants[name].trained)
        return {table: cast(nn.Parameter, self.table(table)[name]) for table in tables}

    def remove(self, name: str) -> None:
        variant = self.variants[name]
        for table in (*variant.trained, *variant.kept):
            del self.table(table)[name]
            if not len(self.table(table)):
                del self._modules[table]
        for values in (self.lora_A, self.lora_B, self.scaling, self.dropout_p, self.variants):
            del values[name]
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

    def extra_repr(self) -> str:
        """Show the adapters when the layer is printed."""
        ranks = ", ".join(f"{name}: r={len(a)}, scaling={self.scaling[name]:g}" for name, a in self.lora_A.items())
        return f"{{{ranks}}}, active={list(self.active)}"
