"""The floating-point operations of a training step: two for each multiplication and addition of a matrix product.

What is not a product (norms, rotations, dequantizing, the optimizer) is not counted: it is limited by memory, not by
arithmetic. A frozen weight has no gradient, so that a step takes 4 FLOPs a weight and token where full fine-tuning
takes 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from ..models.attention import query_blocks
from .activations import Checkpointing, MicroBatch, is_adapted, layer_checkpointing
from .shape import LayerShape, LinearShape, ModelShape


@dataclass(frozen=True)
class Flops:
    """FLOPs of a training step by part.

    Attributes:
        forward: y = x Wᵀ of the layers' frozen weights.
        input_gradients: dx = dy W.
        adapters: their products, forward and backward.
        attention: scores and their products with values, forward and backward; half of the square, as causality allows.
        head: logits and the gradient of the hidden states.
        recomputed: what checkpointing computes a second time.
    """

    forward: int
    input_gradients: int
    adapters: int
    attention: int
    head: int
    recomputed: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Name of the part -> FLOPs."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __mul__(self, count: int) -> Flops:
        return Flops(**{name: count * flops for name, flops in self.parts.items()})


def step_flops(shape: ModelShape, batch: MicroBatch, checkpointing: Checkpointing) -> Flops:
    """Return the FLOPs of the forward and backward pass of a micro-batch."""
    forward = gradients = adapters = attention = recomputed = 0
    products = _attention_product(shape, batch)
    has_gradient = False
    for index, layer in enumerate(shape.layers):
        kind = layer_checkpointing(checkpointing, index)
        before_mlp = _before_mlp(layer, has_gradient)
        groups = _groups(layer, has_gradient)
        has_gradient, in_attention = before_mlp or is_adapted(*layer.gate_up, layer.down), groups[1][1]
        for group, x_has_gradient in groups:
            forward += _product(group, batch)
            gradients += _product(group, batch) * x_has_gradient
            adapters += _adapters(group, batch, x_has_gradient)
        attention += (2 + 5 * in_attention) * products
        if kind != "none" and has_gradient:
            again = groups if kind == "layer" else groups[2:]
            recomputed += sum(_forward(group, batch) for group, _ in again) + 2 * products * (kind == "layer")
    trained = 2 * batch.trained
    head = trained * shape.head.elements * (1 + (has_gradient or shape.head.rank > 0))
    ranks = shape.head.rank * (3 * shape.head.in_features + 3 * shape.head.out_features)
    return Flops(forward, gradients, adapters + trained * ranks, attention, head, recomputed)


def _groups(layer: LayerShape, has_gradient: bool) -> list[tuple[Sequence[LinearShape], bool]]:
    """Return the layers that read the same x, and whether x has a gradient."""
    mixed = has_gradient or is_adapted(*layer.qkv)
    stream = _before_mlp(layer, has_gradient)
    hidden = stream or is_adapted(*layer.gate_up)
    return [(layer.qkv, has_gradient), ((layer.output,), mixed), (layer.gate_up, stream), ((layer.down,), hidden)]


def _before_mlp(layer: LayerShape, has_gradient: bool) -> bool:
    return has_gradient or is_adapted(*layer.qkv, layer.output)


def _product(group: Sequence[LinearShape], batch: MicroBatch) -> int:
    return 2 * batch.tokens * sum(linear.elements for linear in group)


def _forward(group: Sequence[LinearShape], batch: MicroBatch) -> int:
    return _product(group, batch) + 2 * batch.tokens * sum(sum(linear.adapter) for linear in group)


def _adapters(group: Sequence[LinearShape], batch: MicroBatch, x_has_gradient: bool) -> int:
    """Return u = x Aᵀ and u Bᵀ, then t = dy B, tᵀ x, dyᵀ u, and t A where x has a gradient."""
    per_token = sum(
        linear.rank * ((2 + x_has_gradient) * linear.in_features + 3 * linear.out_features) for linear in group
    )
    return 2 * batch.tokens * per_token


def _attention_product(shape: ModelShape, batch: MicroBatch) -> int:
    """Return the FLOPs of one of attention's products, such as q kᵀ, over blocks of queries that see no later key."""
    pairs = sum((last - first) * seen for first, last, seen in query_blocks(batch.length, batch.length))
    return 2 * batch.sequences * shape.config.num_attention_heads * shape.config.head_dim * pairs
