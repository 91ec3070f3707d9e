"""`LoRALinear`: a frozen linear layer plus trainable low-rank updates, forward and backward written out."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from ..errors import ShapeError
from .linear4bit import Linear4bit, product_weight


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update (Hu et al. 2021, arXiv:2106.09685, eq. 3).

        y = base(x) + scaling * (x @ lora_A.T) @ lora_B.T

    Several named adapters can be attached; the updates of the active ones are summed. A and B are fp32 masters by
    default; products run in the dtype of x.

    Shapes:
        x (..., in_features) -> y (..., out_features); lora_A[name] (r, in_features); lora_B[name] (out_features, r)

    Attributes:
        base_layer: the frozen nn.Linear or Linear4bit; its bytes are never changed.
        scaling, dropout_p: adapter name -> factor on B @ A, dropout on the adapter's input.
        active: names of the adapters whose updates are added, in order.

    Raises:
        ShapeError: x's last dimension is not in_features.
    """

    def __init__(self, base_layer: nn.Linear | Linear4bit) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.dropout_p: dict[str, float] = {}
        self.active: tuple[str, ...] = ()

    def add(
        self,
        name: str,
        r: int,
        scaling: float,
        dropout_p: float = 0.0,
        init: bool | Literal["gaussian"] = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Attach an adapter of rank r, initialised so that (unless init is False) it changes nothing yet.

        A is uniform within 1 / sqrt(in_features) (Kaiming with a = sqrt(5), as in the paper's code) or, for "gaussian",
        normal with deviation 1 / r; B is zero. init=False makes B random as well, for tests of file formats.
        """
        device = next(self.base_layer.parameters()).device
        lora_a = torch.empty(r, self.in_features, device=device)
        lora_b = torch.zeros(self.out_features, r, device=device)
        if init == "gaussian":
            nn.init.normal_(lora_a, std=1 / r)
        else:
            nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))
        self.lora_A[name], self.lora_B[name] = nn.Parameter(lora_a.to(dtype)), nn.Parameter(lora_b.to(dtype))
        self.scaling[name], self.dropout_p[name] = scaling, dropout_p

    def remove(self, name: str) -> None:
        """Detach an adapter."""
        for table in (self.lora_A, self.lora_B, self.scaling, self.dropout_p):
            del table[name]
        self.active = tuple(other for other in self.active if other != name)

    def delta_weight(self, name: str) -> Tensor:
        """Return the update scaling * B @ A, (out_features, in_features), in the dtype of A."""
        delta: Tensor = self.scaling[name] * (self.lora_B[name] @ self.lora_A[name])
        return delta

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"LoRALinear({self.in_features} -> {self.out_features}) got x of shape {tuple(x.shape)}")
        active = self.active
        if len(active) == 1 and self._can_fuse(active[0], x):
            (name,) = active
            fused: Tensor = _LoRALinearFunction.apply(
                x, self.lora_A[name], self.lora_B[name], self.scaling[name], self.base_layer
            )
            return fused
        y: Tensor = self.base_layer(x)
        for name in active:
            dropped = dropout(x, self.dropout_p[name], self.training)
            u = linear(dropped, self.lora_A[name].to(x.dtype))  # (..., r)
            y = y + self.scaling[name] * linear(u, self.lora_B[name].to(x.dtype))
        return y

    def _can_fuse(self, name: str, x: Tensor) -> bool:
        if torch.is_autocast_enabled(x.device.type):  # which picks the dtype of each product by itself
            return False
        if getattr(self.base_layer, "compute_dtype", None) not in (None, x.dtype):
            return False
        own = self.base_layer._parameters.values()  # .parameters() would take 20 µs, a fifth of a small layer's time
        is_frozen = not any(parameter is not None and parameter.requires_grad for parameter in own)
        return is_frozen and not (self.training and self.dropout_p[name])

    def extra_repr(self) -> str:
        """Show the adapters when the layer is printed."""
        ranks = ", ".join(f"{name}: r={len(a)}, scaling={self.scaling[name]:g}" for name, a in self.lora_A.items())
        return f"{{{ranks}}}, active={list(self.active)}"


class _LoRALinearFunction(torch.autograd.Function):
    """The layer and its gradients by hand; W is frozen, so dW is never formed.

        u = x Aᵀ                 (tokens, r), saved
        y = x Wᵀ + b + s·u Bᵀ

        t  = s·dy B              (tokens, r)
        dx = dy W + t A
        dA = tᵀ x
        dB = s·dyᵀ u

    That is 4·tokens·r·(in + out) FLOPs for the adapter's backward. x is saved once, as it came; layers that read the
    same x share it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, base: nn.Linear | Linear4bit
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        bias = None if base.bias is None else base.bias.to(x.dtype)
        u = flat @ lora_a.to(x.dtype).T
        y = linear(flat, product_weight(base, x.dtype), bias)
        y.addmm_(u, lora_b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(x, u, lora_a, lora_b)
        ctx.scaling, ctx.base = scaling, base
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, u, lora_a, lora_b = ctx.saved_tensors
        flat, dy = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        t = ctx.scaling * (dy @ lora_b.to(dy.dtype))
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ product_weight(ctx.base, dy.dtype)
            dx = dx.addmm_(t, lora_a.to(dy.dtype)).view(x.shape)
        if ctx.needs_input_grad[1]:
            da = (t.T @ flat).to(lora_a.dtype)
        if ctx.needs_input_grad[2]:
            db = (ctx.scaling * (dy.T @ u)).to(lora_b.dtype)
        return dx, da, db, None, None
