"""`LoRALinear`: a frozen linear layer plus trainable low-rank updates, forward and backward written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from ..errors import ShapeError
from .linear4bit import Linear4bit, add_frozen_linear_dx, frozen_linear, frozen_linear_dx


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
        if self.can_fuse(x):
            return _fused(x, self)[0]
        y: Tensor = self.base_layer(x)
        for name in self.active:
            dropped = dropout(x, self.dropout_p[name], self.training)
            u = linear(dropped, self.lora_A[name].to(x.dtype))  # (..., r)
            y = y + self.scaling[name] * linear(u, self.lora_B[name].to(x.dtype))
        return y

    def can_fuse(self, x: Tensor) -> bool:
        """Return whether one function computes base and adapter: one active adapter, and nothing that forbids it."""
        if len(self.active) != 1 or x.shape[-1] != self.in_features:
            return False
        if torch.is_autocast_enabled(x.device.type):  # which picks the dtype of each product by itself
            return False
        if getattr(self.base_layer, "compute_dtype", None) not in (None, x.dtype):
            return False
        own = self.base_layer._parameters.values()  # .parameters() would take 20 µs, a fifth of a small layer's time
        is_frozen = not any(parameter is not None and parameter.requires_grad for parameter in own)
        return is_frozen and not (self.training and self.dropout_p[self.active[0]])

    def extra_repr(self) -> str:
        """Show the adapters when the layer is printed."""
        ranks = ", ".join(f"{name}: r={len(a)}, scaling={self.scaling[name]:g}" for name, a in self.lora_A.items())
        return f"{{{ranks}}}, active={list(self.active)}"


# How to compute x again, in the backward pass, from tensors that something else keeps anyway: function(*tensors).
Again = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def linear_together(x: Tensor, *layers: nn.Module, again: Again | None = None) -> tuple[Tensor, ...]:
    """Apply several linear layers to one x, as q, k and v or gate and up: the same as calling each.

    Where all are LoRA layers, their adapters' products with x, and with its gradient, are one product each. With
    `again` they do not keep x for the backward pass but compute it anew: cheap for what a norm or an activation gave.
    """
    if all(isinstance(layer, LoRALinear) and layer.can_fuse(x) and not _has_hooks(layer) for layer in layers):
        return _fused(x, *(layer for layer in layers if isinstance(layer, LoRALinear)), again=again)
    return tuple(layer(x) for layer in layers)


def _has_hooks(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks)


def _fused(x: Tensor, *layers: LoRALinear, again: Again | None = None) -> tuple[Tensor, ...]:
    frozen = tuple((layer.base_layer, layer.scaling[layer.active[0]]) for layer in layers)
    lora_a = (layer.lora_A[layer.active[0]] for layer in layers)
    lora_b = (layer.lora_B[layer.active[0]] for layer in layers)
    function, sources = again or (None, ())
    result: tuple[Tensor, ...] = _LoRALinearFunction.apply(x, frozen, function, *lora_a, *lora_b, *sources)
    return result


class _LoRALinearFunction(torch.autograd.Function):
    """Layers that read the same x, with their gradients by hand; each W is frozen, so dW is never formed.

        u = x Aᵀ                 (tokens, r), saved; the A of all layers stacked
        y = x Wᵀ + b + s·u Bᵀ    for each layer, with its own part of u

        t  = s·dy B              (tokens, r), for each layer, then stacked
        dx = Σ dy W + t A
        dA = tᵀ x
        dB = s·dyᵀ u             for each layer

    That is 4·tokens·r·(in + out) FLOPs for an adapter's backward. x is saved once, as it came, or not at all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: tuple[tuple[nn.Linear | Linear4bit, float], ...],
        again: Callable[..., Tensor] | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(frozen)
        lora_a, lora_b, sources = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        flat = x.reshape(-1, x.shape[-1])
        u = flat @ _stacked(lora_a, x.dtype).T
        results = []
        for (base, scaling), b, part in zip(frozen, lora_b, u.split([len(a) for a in lora_a], dim=1), strict=True):
            bias = None if base.bias is None else base.bias.to(x.dtype)
            y = frozen_linear(base, flat, bias, (part, b.to(x.dtype)), scaling)
            results.append(y.view(*x.shape[:-1], y.shape[-1]))
        ctx.save_for_backward(u, *lora_a, *lora_b, *(sources if again else (x,)))
        ctx.frozen, ctx.again, ctx.shape = frozen, again, x.shape
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, *tensors = ctx.saved_tensors
        count, dtype = len(grads), u.dtype
        lora_a, lora_b, sources = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        needed = ctx.needs_input_grad[3:]
        ranks = [len(a) for a in lora_a]
        dys = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        scalings = [scaling for _, scaling in ctx.frozen]
        t = torch.cat([s * (dy @ b.to(dtype)) for s, dy, b in zip(scalings, dys, lora_b, strict=True)], dim=1)
        dx: Tensor | None = None
        da: list[Tensor | None] = [None] * count
        db: list[Tensor | None] = [None] * count
        if ctx.needs_input_grad[0]:
            (first, _), *others = ctx.frozen
            dx = frozen_linear_dx(first, dys[0], (t, _stacked(lora_a, dtype)))
            for dy, (base, _) in zip(dys[1:], others, strict=True):
                add_frozen_linear_dx(dx, base, dy)
            dx = dx.view(ctx.shape)
        if any(needed[:count]):
            x = ctx.again(*sources) if ctx.again else sources[0]
            parts = (t.T @ x.reshape(-1, x.shape[-1])).split(ranks)
            da = [part.to(a.dtype) for part, a in zip(parts, lora_a, strict=True)]
        if any(needed[count : 2 * count]):
            parts = u.split(ranks, dim=1)
            products = zip(scalings, dys, parts, lora_b, strict=True)
            db = [(s * (dy.T @ part)).to(b.dtype) for s, dy, part, b in products]
        return dx, None, None, *da, *db, *(None for _ in (sources if ctx.again else ()))


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return matrices of one width on top of each other, in `dtype`."""
    cast = [matrix.to(dtype) for matrix in matrices]
    return cast[0] if len(cast) == 1 else torch.cat(cast)
