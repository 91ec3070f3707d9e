"""`LoRALinear`: a frozen linear layer plus trainable low-rank updates, with forward and backward written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from lorakit_kernels import drop, is_transformed
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import ShapeError
from ..sums import summed_product
from .adapted import AdaptedLayer, first_argument
from .dropout import draw_seed
from .frozen.calls import PLAIN_TENSORS, has_hooks, has_own_forward, is_dense, is_known_class, loaded
from .frozen.linear4bit import Linear4bit, add_frozen_linear_dx, frozen_linear, frozen_linear_dx, is_conv1d
from .frozen.values import values_of
from .gains import gain_minus_one
from .row_products import forward_by_rows, linear_with_rows

_unsafe_view = torch.ops.aten._unsafe_view.default
_LEADING = 5  # number of arguments of the function before its tensors


class LoRALinear(AdaptedLayer):
    """A frozen linear layer plus a trainable low-rank update (Hu et al. 2021, arXiv:2106.09685, eq. 3).

        y = base(x) + scaling * (x @ lora_A.T) @ lora_B.T

    Several named adapters can be attached, and the updates of the active ones are summed. With DoRA the layer is
    y = gain * (x @ W.T + scaling * (x @ lora_A.T) @ lora_B.T) + bias. The base is an nn.Linear, a Linear4bit or GPT-2's
    Conv1D, whose weight is W.T.

    Shapes:
        x (..., in_features) -> y (..., out_features); lora_A[name] (r, in_features); lora_B[name] (out_features, r)

    Raises:
        ShapeError: x's last dimension is not in_features.
    """

    base_layer: nn.Linear | Linear4bit

    def __init__(self, base_layer: nn.Linear | Linear4bit) -> None:
        self.is_conv1d = is_conv1d(base_layer)
        if self.is_conv1d:
            in_features, out_features = cast(Tensor, base_layer.weight).shape
        else:
            in_features, out_features = base_layer.in_features, base_layer.out_features
        super().__init__(base_layer, in_features, out_features)
        self._takes_weight = False

    @staticmethod
    def fits(module: nn.Module) -> bool:
        # nn.MultiheadAttention reads the weight of its projection and never calls the module.
        is_read_by_others = isinstance(module, NonDynamicallyQuantizableLinear)
        return (isinstance(module, nn.Linear | Linear4bit) or is_conv1d(module)) and not is_read_by_others

    def base_rows(self, rows: slice) -> Tensor:
        if self.is_conv1d or is_dense(self.base_layer._parameters.get("weight")):
            return super().base_rows(rows)
        values = values_of(self.base_layer, torch.float32, rows)
        return super().base_rows(rows) if values is None else values

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.is_conv1d else weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.is_conv1d else matrix

    def project(self, matrix: Tensor) -> Tensor:
        if not is_known_class(self.base_layer):
            return super().project(matrix)
        with loaded(self.base_layer):
            return frozen_linear(self.base_layer, matrix, None)

    def low_rank(self, lora_a: Tensor, lora_b: Tensor, x: Tensor) -> Tensor:
        return linear(linear(x, lora_a.to(x.dtype)), lora_b.to(x.dtype))

    def apply_matrix(self, matrix: Tensor, x: Tensor) -> Tensor:
        return linear(x, matrix.to(x.dtype))

    def made_up_input(self, generator: torch.Generator) -> Tensor:
        return torch.randn(4, self.in_features, generator=generator)

    @property
    def takes_weight(self) -> bool:
        """Whether the base layer was seen to return something other than a product, such as a router's choice."""
        return self._takes_weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = first_argument(args, kwargs)
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"LoRALinear({self.in_features} -> {self.out_features}) got x of shape {tuple(x.shape)}")
        if len(args) + len(kwargs) == 1:
            if self.can_fuse(x):
                return _LoRALinearFunction.apply(*_arguments(x, (self,)))[0]
            if self.can_batch_rows():
                return linear_with_rows(x, self)[0]
        return self.call(*args, **kwargs) if self.rows is None else forward_by_rows(self, *args, **kwargs)

    def is_product(self, y: object, x: Tensor) -> bool:
        """Return whether the base layer's output y has the form of x Wᵀ, as in all classes but routers and the like.

        As in PEFT, a subclass may scale or quantize the product as it likes. Only another output needs the weight.
        """
        has_form = isinstance(y, Tensor) and y.shape == (*x.shape[:-1], self.out_features)
        self._takes_weight = not has_form and has_own_forward(self.base_layer)
        return not self._takes_weight

    def can_batch_rows(self) -> bool:
        """Return whether the rows' adapters can be batched: each is a low-rank update, perhaps with a gain."""
        if self.rows is None or self._takes_weight:
            return False
        names = [name for name in self.rows.adapters if name in self.adapters]
        if has_hooks(self.base_layer) and any(self.adapters[name].variant.has_gain for name in names):
            return False
        return all(self.adapters[name].variant.is_factored and not self.has_offset(name) for name in names)

    def can_fuse(self, x: Tensor) -> bool:
        """Return whether one function can compute base and adapter for x (..., in_features).

        There must be one active adapter, and nothing that the fused function does not compute: the base layer is one
        whose call is its product alone.
        """
        if self.rows is not None or len(self.active) != 1 or x.shape[-1] != self.in_features or is_transformed():
            return False
        variant = self.adapters[self.active[0]].variant
        if not variant.is_fused or "trained_bias" in self._modules:
            return False
        if torch.is_autocast_enabled(x.device.type):  # autocast picks the dtype of each product
            return False
        base = self.base_layer
        if base.__dict__.get("compute_dtype") not in (None, x.dtype) or has_hooks(base) or not is_known_class(base):
            return False
        for parameter in base._parameters.values():  # .parameters() takes 20 µs, a fifth of a small layer's time
            if parameter is not None and (parameter.requires_grad or type(parameter) not in PLAIN_TENSORS):
                return False
        # With dropout, the gain also scales the base's product with the dropped x: another product of the whole weight.
        return not (variant.has_gain and self.drop_rate(self.active[0]))


# How the backward pass recomputes x, as function(*tensors), from tensors that are kept anyway.
Recompute = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def linear_together(x: Tensor, *layers: nn.Module, recompute: Recompute | None = None) -> tuple[Tensor, ...]:
    """Apply several linear layers to one x, such as q, k and v or gate and up. The results are as from calling each.

    If all are LoRA layers, their adapters share one product with x and one with its gradient. Dropout then drops the
    same elements of x for all of them.

    Args:
        x: (..., in_features).
        layers: the linear layers.
        recompute: compute x again in the backward pass instead of keeping it, which is cheap after a norm or an
            activation.

    Returns:
        (..., out_features) for each layer.
    """
    adapted = [layer for layer in layers if isinstance(layer, LoRALinear) and not has_hooks(layer)]
    if len(adapted) == len(layers) and all(layer.can_fuse(x) for layer in adapted) and _drop_alike(adapted):
        ys: tuple[Tensor, ...] = _LoRALinearFunction.apply(*_arguments(x, adapted, recompute))
        return ys[: len(adapted)]
    if len(adapted) == len(layers) and all(layer.can_batch_rows() for layer in adapted):
        return linear_with_rows(x, *adapted)
    return tuple(layer(x) for layer in layers)


def _drop_alike(layers: Sequence[LoRALinear]) -> bool:
    return len({layer.drop_rate(layer.active[0]) for layer in layers}) == 1


def _arguments(x: Tensor, layers: Sequence[LoRALinear], recompute: Recompute | None = None) -> tuple[Any, ...]:
    """Return the arguments of `_LoRALinearFunction` for layers that `can_fuse` x, (..., in_features)."""
    adapters = [layer.adapters[layer.active[0]] for layer in layers]
    rate = layers[0].drop_rate(layers[0].active[0])
    pairs = list(zip(layers, adapters, strict=True))
    gains = [adapter.variant.gain(layer, adapter, x.dtype) for layer, adapter in pairs]
    frozen = tuple(
        _FrozenLayer(layer.base_layer, adapter.scaling / (1 - rate), gain is not None)
        for (layer, adapter), gain in zip(pairs, gains, strict=True)
    )
    lora_a = (adapter.lora_A for adapter in adapters)
    lora_b = (adapter.lora_B for adapter in adapters)
    function, sources = recompute or (None, ())
    given_gains = (gain for gain in gains if gain is not None)
    return x, frozen, function, rate, draw_seed() if rate else None, *lora_a, *lora_b, *given_gains, *sources


class _FrozenLayer(NamedTuple):
    """A layer's arguments of the function, apart from tensors with a gradient."""

    base: nn.Linear | Linear4bit
    scaling: float
    has_gain: bool


class _LoRALinearFunction(torch.autograd.Function):
    """Layers that read the same x, with their gradients by hand. Each W is frozen, so dW is never formed.

        u = m∘x Aᵀ               (tokens, r), saved; the A of all layers are stacked
        z = x Wᵀ + s·u Bᵀ        for each layer, with its own part of u
        y = g∘z + b              g (out,) is 1, or the variant's gain, such as DoRA's

        dg = Σ dy∘z, dz = g∘dy   over the tokens
        t  = s·dz B              (tokens, r), for each layer, then stacked
        dx = Σ dz W + m∘(t A)
        dA = tᵀ (m∘x)
        dB = s·dzᵀ u             for each layer

    An adapter's backward pass thus takes 4·tokens·r·(in + out) FLOPs.

    x is saved once, in its own dtype. It is not saved if A is frozen (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303).
    Without a bias, z is computed as y / g: saving y costs nothing if the next operation saves it too, as SwiGLU does.
    m is 1 without dropout. With dropout it is 0 for dropped elements, drawn from a seed whenever it is needed. s then
    contains the factor 1 / (1 − p), so that no x is rounded for it.

    Second derivatives: u, and each z that is saved, are results that only the backward pass reads. The gradient of this
    pass reaches x, A and B through them, as du, which adds to t, and dz, which adds to g∘dy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: tuple[_FrozenLayer, ...],
        recompute: Callable[..., Tensor] | None,
        rate: float,
        seed: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        lora_a, lora_b, gains, sources = _split_by_kind(frozen, tensors)
        train_a, _, train_gain, _ = _split_by_kind(frozen, ctx.needs_input_grad[_LEADING:])
        flat = x.reshape(-1, x.shape[-1])
        # PyTorch adds a bias to rows that are not contiguous in a step of its own, which rounds otherwise.
        rows = flat if x.dim() == 2 or x.is_contiguous() else x
        u = (flat if seed is None else drop(flat, seed, rate)) @ _stacked(lora_a, x.dtype).T
        us = u.split([len(a) for a in lora_a], dim=1)
        results, products, kept_zs = [], [], []
        for (base, scaling, _), b, own_u, gain, is_trained in zip(frozen, lora_b, us, gains, train_gain, strict=True):
            bias = None if base.bias is None else base.bias.to(x.dtype)
            y = frozen_linear(base, rows, bias if gain is None else None, (own_u, b.to(x.dtype)), scaling)
            if gain is not None:
                kept_zs += [y.clone()] if bias is not None and is_trained else []
                y.addcmul_(y, gain_minus_one(gain, y.dtype))
                y = y if bias is None else y.add_(bias)
            # Not y.view: PyTorch lets nobody change a function's views in place, as `y *= scaling` does.
            results.append(y if x.dim() == 2 else _unsafe_view(y, [*x.shape[:-1], y.shape[-1]]))
            if gain is not None and is_trained:
                products.append(results[-1] if bias is None else kept_zs[-1])
        parameters = tensors[: len(tensors) - len(sources)]
        kept = () if not any(train_a) else sources if recompute else (x,)  # for dA
        ctx.save_for_backward(seed, u, *parameters, *products, *kept)
        ctx.frozen, ctx.recompute, ctx.rate, ctx.shape, ctx.sources = frozen, recompute, rate, x.shape, len(sources)
        if not torch.compiler.is_compiling():  # which knows only gradients that are tensors
            ctx.set_materialize_grads(False)
        return *results, u, *kept_zs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        seed, u, *tensors = ctx.saved_tensors
        frozen: tuple[_FrozenLayer, ...] = ctx.frozen
        lora_a, lora_b, gains, rest = _split_by_kind(frozen, tensors)
        count, dtype = len(frozen), u.dtype
        train_a, train_b, train_gain, _ = _split_by_kind(frozen, ctx.needs_input_grad[_LEADING:])
        product_count = sum(map(bool, train_gain))
        products, sources = iter(rest[:product_count]), rest[product_count:]
        dys, du, of_zs = _filled(grads[:count], u, lora_b), grads[count], iter(grads[count + 1 :])
        dzs, dgains = [], []
        for dy, (base, _, _), gain, is_trained in zip(dys, frozen, gains, train_gain, strict=True):
            dz = dy
            if gain is not None:
                dz = torch.addcmul(dy, dy, gain_minus_one(gain, dtype))
                dgain = summed_product(dy, next(products)) if is_trained else None
                if is_trained and base.bias is None:  # z = y / g
                    dgain = dgain / gain.masked_fill(gain == 0, torch.inf)
                elif is_trained and (of_z := next(of_zs)) is not None:
                    dz = dz + of_z
                dgains.append(dgain)
            dzs.append(dz)
        t = torch.cat([f.scaling * (dz @ b.to(dtype)) for f, dz, b in zip(frozen, dzs, lora_b, strict=True)], dim=1)
        t = t if du is None else t + du
        dx: Tensor | None = None
        da: list[Tensor | None] = [None] * count
        db: list[Tensor | None] = [None] * count
        if ctx.needs_input_grad[0]:
            update = t, _stacked(lora_a, dtype)
            dx = frozen_linear_dx(frozen[0].base, dzs[0], update if seed is None else ())
            if seed is not None:
                dropped = drop(update[0] @ update[1], seed, ctx.rate)
                dx = dx + dropped if torch.is_grad_enabled() else dx.add_(dropped)
            for dz, layer in zip(dzs[1:], frozen[1:], strict=True):
                dx = add_frozen_linear_dx(dx, layer.base, dz)
            dx = dx.view(ctx.shape)
        ranks = [len(a) for a in lora_a]
        if any(train_a):
            x = ctx.recompute(*sources) if ctx.recompute else sources[0]
            x = x.reshape(-1, x.shape[-1])
            stacked_da = t.T @ (x if seed is None else drop(x, seed, ctx.rate))
            da = [own_da.to(a.dtype) for own_da, a in zip(stacked_da.split(ranks), lora_a, strict=True)]
        if any(train_b):
            layers = zip(frozen, dzs, u.split(ranks, dim=1), lora_b, strict=True)
            db = [(f.scaling * (dz.T @ own_u)).to(b.dtype) for f, dz, own_u, b in layers]
        return dx, *(None for _ in range(_LEADING - 1)), *da, *db, *dgains, *(None for _ in range(ctx.sources))


def _split_by_kind(frozen: Sequence[_FrozenLayer], values: Sequence[Any]) -> tuple[Any, Any, list[Any], Any]:
    """Split values in the order of the function's tensors: each A, each B, each gain (None without one), the rest."""
    count, gain_count = len(frozen), sum(layer.has_gain for layer in frozen)
    given_gains = iter(values[2 * count : 2 * count + gain_count])
    gains = [next(given_gains) if layer.has_gain else None for layer in frozen]
    return values[:count], values[count : 2 * count], gains, values[2 * count + gain_count :]


def _filled(grads: Sequence[Tensor | None], u: Tensor, lora_b: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of the results as (tokens, out_features), zero for a result that nobody used."""
    given = next((grad for grad in grads if grad is not None), u)  # under vmap, zeros are batched as the others are
    return [
        given.new_zeros(len(u), len(b)) if grad is None else grad.reshape(-1, grad.shape[-1])
        for grad, b in zip(grads, lora_b, strict=True)
    ]


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return matrices of one width stacked along the first dimension, in `dtype`."""
    cast = [matrix.to(dtype) for matrix in matrices]
    return cast[0] if len(cast) == 1 else torch.cat(cast)
