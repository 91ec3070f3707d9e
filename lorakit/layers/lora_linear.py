"""`LoRALinear`: a frozen linear layer plus trainable low-rank updates, forward and backward written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from ..errors import ShapeError
from .adapted import AdaptedLayer
from .linear4bit import Linear4bit, add_frozen_linear_dx, frozen_linear, frozen_linear_dx


class LoRALinear(AdaptedLayer):
    """A frozen linear layer plus a trainable low-rank update (Hu et al. 2021, arXiv:2106.09685, eq. 3).

        y = base(x) + scaling * (x @ lora_A.T) @ lora_B.T

    Several named adapters can be attached; the updates of the active ones are summed. With DoRA the layer is
    y = gain * (x @ W.T + scaling * (x @ lora_A.T) @ lora_B.T) + bias.

    Shapes:
        x (..., in_features) -> y (..., out_features); lora_A[name] (r, in_features); lora_B[name] (out_features, r)

    Raises:
        ShapeError: x's last dimension is not in_features.
    """

    base_layer: nn.Linear | Linear4bit

    def __init__(self, base_layer: nn.Linear | Linear4bit) -> None:
        super().__init__(base_layer, base_layer.in_features, base_layer.out_features)

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        if isinstance(self.base_layer, Linear4bit):
            return self.base_layer.dense_weight(dtype)
        return self.base_layer.weight.detach().to(dtype)

    def project(self, matrix: Tensor) -> Tensor:
        return frozen_linear(self.base_layer, matrix, None)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"LoRALinear({self.in_features} -> {self.out_features}) got x of shape {tuple(x.shape)}")
        if self.can_fuse(x):
            return _fused(x, self)[0]
        y: Tensor = self.base_layer(x)
        base = y
        for name in self.active:
            dropped = dropout(x, self.dropout_p[name], self.training)
            u = linear(dropped, self.lora_A[name].to(x.dtype))  # (..., r)
            update = self.scaling[name] * linear(u, self.lora_B[name].to(x.dtype))
            gain = self.variants[name].gain(self, name, x.dtype)
            if gain is not None:
                if dropped is not x:  # DoRA's whole product has the dropout, not the update alone
                    base = self.base_layer(dropped)
                product = base if self.base_layer.bias is None else base - self.base_layer.bias.to(base.dtype)
                gain = gain.to(x.dtype)
                update = (gain - 1) * product + gain * update
            y = y + update
        return y

    def can_fuse(self, x: Tensor) -> bool:
        """Return whether one function computes base and adapter: one active adapter, and nothing that forbids it."""
        if len(self.active) != 1 or x.shape[-1] != self.in_features or self.variants[self.active[0]].name != "plain":
            return False
        if torch.is_autocast_enabled(x.device.type):  # which picks the dtype of each product by itself
            return False
        if getattr(self.base_layer, "compute_dtype", None) not in (None, x.dtype):
            return False
        own = self.base_layer._parameters.values()  # .parameters() would take 20 µs, a fifth of a small layer's time
        is_frozen = not any(parameter is not None and parameter.requires_grad for parameter in own)
        return is_frozen and not (self.training and self.dropout_p[self.active[0]])


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
