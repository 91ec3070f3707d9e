"""`ResidualLinear4bit`: a 4-bit linear layer with a frozen low-rank part for what the codes cannot represent."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...errors import ShapeError
from ...quantization import QuantizedWeight
from .linear4bit import Linear4bit
from .quantized_module import frozen


class ResidualLinear4bit(Linear4bit):
    """A frozen linear layer whose weight is 4-bit codes plus a low-rank matrix.

        y = x @ (dequantize(W) + up @ down).T + bias

    Merging into 4 bits makes this layer if there is no 16-bit weight to merge into. Rounding to 4 bits would lose a
    small update entirely; the low-rank part keeps it.

    Shapes:
        x (..., in_features) -> y (..., out_features); residual_up (out_features, k); residual_down (k, in_features)

    Args:
        weight, bias, compute_dtype, storage_dtype: as for `Linear4bit`.
        up, down: the low-rank part, (out_features, k) and (k, in_features).

    Raises:
        ShapeError: as for `Linear4bit`, or up and down do not fit the weight.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        up: Tensor,
        down: Tensor,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        storage_dtype: torch.dtype = torch.uint8,
    ) -> None:
        super().__init__(weight, bias, compute_dtype, storage_dtype)
        if up.shape != (self.out_features, len(down)) or down.shape != (up.shape[-1], self.in_features):
            raise ShapeError(
                f"up {tuple(up.shape)} and down {tuple(down.shape)} do not fit a weight of shape {tuple(weight.shape)}"
            )
        self.residual_up, self.residual_down = frozen(up), frozen(down)

    def dense_weight(self, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
        """Return the weight with its low-rank part, or some of its rows, as a fresh tensor in `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        up = self.residual_up if rows is None else self.residual_up[rows]
        low_rank = up.to(wide) @ self.residual_down.to(wide)
        return (super().dense_weight(wide, rows) + low_rank).to(dtype)

    def add_residual(self, y: Tensor, x: Tensor) -> Tensor:
        u = linear(x, self.residual_down.to(x.dtype))  # (..., k)
        return y.add_(linear(u, self.residual_up.to(x.dtype)))

    def add_residual_dx(self, dx: Tensor, dy: Tensor) -> Tensor:
        t = dy @ self.residual_up.to(dy.dtype)  # (..., k)
        residual = t @ self.residual_down.to(dy.dtype)
        return dx + residual if torch.is_grad_enabled() else dx.add_(residual)

    def extra_repr(self) -> str:
        """Show the layer's geometry when it is printed."""
        return f"{super().extra_repr()}, residual rank {len(self.residual_down)}"
