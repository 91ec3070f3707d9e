"""`LoRAParameter`: low-rank updates of one parameter of a module, such as the experts' weights of a mixture."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from .adapted import AdaptedLayer


class LoRAParameter(AdaptedLayer):
    """A frozen module with a low-rank update of one parameter; each expert has its own update.

    The module may read the parameter as it likes: within forward it finds W + update there. To adapt several parameters
    of one module, wrap it several times. The layout is that of PEFT's `target_parameters`:

        update of expert e = scaling * B[:, :, e] @ A[e],   A (experts, r, in), B (out, r, experts)

    Shapes:
        the parameter (experts, out, in), or (experts, in, out) if the module sets `is_transposed`, or (out, in);
        lora_A[name] (experts * r, in); lora_B[name] (out, r * experts)

    Raises:
        ShapeError: the parameter has neither two nor three dimensions.
    """

    def __init__(self, base_layer: nn.Module, parameter: str) -> None:
        inner, path = base_layer, parameter
        while isinstance(inner, LoRAParameter):
            inner, path = inner.base_layer, f"base_layer.{path}"
        shape = cast(Tensor, getattr(inner, parameter)).shape
        if len(shape) not in (2, 3):
            raise ShapeError(f"parameter '{parameter}' has shape {tuple(shape)}; expected two or three dimensions")
        is_transposed = len(shape) == 3 and bool(getattr(inner, "is_transposed", False))
        rows, columns = shape[-2:]
        super().__init__(base_layer, *((rows, columns) if is_transposed else (columns, rows)))
        self.parameter, self.is_transposed, self._path = parameter, is_transposed, path
        self.experts = shape[0] if len(shape) == 3 else None

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return False  # chosen by a parameter's name, never by the module's type

    def frozen_weight(self) -> Tensor:
        return self.base_layer.get_parameter(self._path)

    def matrix_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows = r * (self.experts or 1)
        return (rows, self.in_features), (self.out_features, rows)

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        return self.frozen_weight().detach().to(dtype)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2) if self.is_transposed else weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        return self.as_matrix(matrix)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return (up, down), (experts, out, r) and (experts, r, in) or without experts, with the scaling in `up`."""
        up, down = super().factors(name)
        if self.experts is None:
            return up, down
        up = up.view(self.out_features, -1, self.experts).permute(2, 0, 1)
        return up, down.view(self.experts, -1, self.in_features)

    def delta_weight(self, name: str) -> Tensor:
        up, down = self.factors(name)
        return self.as_weight(up @ down)

    def supports_rows(self, name: str) -> bool:
        return False  # a router scatters the tokens, and only the module knows which row each belongs to

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.base_layer(*args, **kwargs)
        return torch.func.functional_call(self.base_layer, {self._path: self.updated_weight()}, args, kwargs)

    def extra_repr(self) -> str:
        return f"{self.parameter}, {super().extra_repr()}"
