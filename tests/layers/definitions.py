"""Adapted layers in float64, and the same function written out with PyTorch's own operations alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import conv2d, embedding, linear

from lorakit.layers import (
    VARIANTS,
    AdaptedLayer,
    AdapterSpec,
    Embedding4bit,
    Linear4bit,
    LoRAConv,
    LoRAEmbedding,
    LoRALinear,
)
from lorakit.layers.frozen.residual4bit import ResidualLinear4bit
from lorakit.quantization import quantize

DOUBLE = torch.float64
SCALING = 0.7

# Roundings through two layers, forward and thrice back: sums over at most 18 inputs, 3 ranks and 5 outputs in each
# pass, DoRA's norms, and the functions between make it a hundred in each pass. In each of the four passes, terms some
# ten times as large as their sum cancel.
TERMS = 100 * 10**4


def _residual4bit() -> ResidualLinear4bit:
    return ResidualLinear4bit(
        quantize(torch.randn(5, 6) / 3), torch.randn(5, 2) / 3, torch.randn(2, 6) / 3, torch.randn(5).double()
    )


BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 5).double(),
    "linear-no-bias": lambda: nn.Linear(6, 5, bias=False).double(),
    "4bit": lambda: Linear4bit(quantize(torch.randn(5, 6) / 3), torch.randn(5).double()),
    "4bit-no-bias": lambda: Linear4bit(quantize(torch.randn(5, 6) / 3)),
    "4bit-residual": _residual4bit,
    "conv": lambda: nn.Conv2d(2, 5, 3, padding=1).double(),
    "conv-no-bias": lambda: nn.Conv2d(2, 5, 3, padding=1, bias=False).double(),
    "embedding": lambda: nn.Embedding(7, 5).double(),
    "4bit-embedding": lambda: Embedding4bit(quantize(torch.randn(7, 6) / 3), DOUBLE),
}
KINDS = [
    (base, variant)
    for base in BASES
    for variant in VARIANTS
    if not ("embedding" in base and variant == "lora_bias")  # which is refused
    and (base, variant) != ("4bit-residual", "dora")  # whose norms are taken from the weight in fp32
]


def make_layer(base: str, variant: str = "plain", r: int = 2, dropout_p: float = 0.0) -> AdaptedLayer:
    """Return a layer with an adapter "a" whose parameters are all random."""
    layer = next(kind for kind in (LoRALinear, LoRAConv, LoRAEmbedding) if kind.fits(BASES[base]()))(
        BASES[base]().requires_grad_(False)
    )
    layer.add("a", AdapterSpec(r, SCALING, dropout_p, VARIANTS[variant], neutral_start=False), DOUBLE)
    for parameter in layer.parameters_of("a").values():
        parameter.data += 0.2 * torch.randn(parameter.shape, dtype=DOUBLE)
    layer.active = ("a",)
    return layer


def input_of(base: str, *leading: int) -> Tensor:
    if "embedding" in base:
        return torch.randint(7, (2, 3))
    shape = (2, 2, 4, 4) if "conv" in base else (*(leading or (3,)), 6)
    return torch.randn(shape, dtype=DOUBLE)


def defined(layer: AdaptedLayer, parameters: dict[str, Tensor], x: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    """Return the layer's result for x by the definition: gain·(W x + s B A (mask∘x)) + bias.

    DoRA's norms are constants, as in its paper.

    Args:
        parameters: table -> the adapter's tensor.
        mask: the factor on each element of x that dropout draws.
    """
    adapter = layer.adapters["a"]
    weight = layer.as_matrix(layer.base_weight(DOUBLE))
    down, up = (parameters[table].flatten(1) for table in layer.matrices)
    variant, bias, gain = adapter.variant.name, getattr(layer.base_layer, "bias", None), None
    change = SCALING * up @ down
    if variant == "residual":
        change = change - SCALING * adapter.parameters["start_B"].flatten(1) @ adapter.parameters["start_A"].flatten(1)
    elif variant == "hira":
        change = weight * change
    elif variant == "dora":
        gain = parameters["lora_magnitude_vector"] / (weight + change).detach().norm(dim=1)
    elif variant == "lora_bias":
        bias = SCALING * parameters["lora_bias"] + (0 if bias is None else bias)
    if isinstance(layer, LoRALinear):
        y = linear(x, weight) + linear(mask * x, change)
        y = y if gain is None else gain * y
        return y if bias is None else y + bias
    matrix = weight + change if gain is None else gain[:, None] * (weight + change)
    if isinstance(layer, LoRAEmbedding):
        return embedding(x, matrix.T)
    return conv2d(x, matrix.view(5, 2, 3, 3), bias, padding=1)


class Pair:
    """A layer and its definition as two functions of the same tensors: the adapter's parameters, and x if it is float.

    Attributes:
        tensors: the values of these tensors, that require gradients.
    """

    def __init__(self, layer: AdaptedLayer, x: Tensor) -> None:
        self.layer, self.x = layer, x
        self.tables = list(layer.parameters_of("a"))
        own = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters_of("a").values()]
        self.tensors = [*own, x.clone().requires_grad_()] if x.is_floating_point() else own

    def ours(self, *tensors: Tensor) -> Tensor:
        named = {f"{table}.a": tensor for table, tensor in zip(self.tables, tensors, strict=False)}
        result: Tensor = functional_call(self.layer, named, (self._x(tensors),))
        return result

    def theirs(self, *tensors: Tensor) -> Tensor:
        return defined(self.layer, dict(zip(self.tables, tensors, strict=False)), self._x(tensors))

    def _x(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[-1] if self.x.is_floating_point() else self.x

    @property
    def functions(self) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        return self.ours, self.theirs

    @property
    def losses(self) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        return tuple(summed(function) for function in self.functions)  # type: ignore[return-value]


def summed(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return a function to a scalar with derivatives of every order."""

    def loss(*tensors: Tensor) -> Tensor:
        results = function(*tensors)
        results = (results,) if isinstance(results, Tensor) else results
        return torch.stack([result.sin().sum() for result in results]).sum()

    return loss


def derivatives(function: Callable[..., Tensor], tensors: Sequence[Tensor], orders: int = 3) -> list[Tensor]:
    """Return the gradient of a scalar, the gradient of a random combination of that, and so on."""
    found: list[Tensor] = []
    value = function(*tensors)
    generator = torch.Generator().manual_seed(0)
    for order in range(orders):
        gradients = torch.autograd.grad(
            value, tensors, create_graph=order + 1 < orders, allow_unused=True, materialize_grads=True
        )
        found += gradients
        weights = [torch.randn(one.shape, dtype=DOUBLE, generator=generator) for one in gradients]
        value = torch.stack([(one.sin() * weight).sum() for one, weight in zip(gradients, weights, strict=True)]).sum()
    return found
