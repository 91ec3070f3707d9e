"""The floating-point operations of a training step: two for each multiply-add of a matrix product.

Only products are counted. Memory, not arithmetic, limits the rest (norms, rotations, dequantizing, the optimizer). A
frozen weight has no gradient, so a step takes 4 FLOPs a weight and token where full fine-tuning takes 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from ..models.decoder.attention import query_blocks
from .activations import Checkpointing, is_trained, layer_checkpointing
from .groups import MicroBatch, adapter_backward_flops, adapter_forward_flops, forward_flops
from .shape import LayerShape, LinearShape, ModelShape


@dataclass(frozen=True)
class Flops:
    """FLOPs of a training step by part.

    Attributes:
        forward: y = x Wᵀ of the layers' weights.
        input_gradients: dx = dy W.
        adapters: their products, forward and backward, and the gradients of weights that are trained in full.
        attention: scores and their products with values, forward and backward; the causal half of the square.
        head: logits and the gradient of the hidden states.
        recomputed: operations that checkpointing repeats.
    """

    forward: int
    input_gradients: int
    adapters: int
    attention: int
    head: int
    recomputed: int

    @property
    def total(self) -> int:
        """FLOPs of all parts."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Name of the part -> FLOPs."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __mul__(self, count: int) -> Flops:
        return Flops(**{name: count * flops for name, flops in self.parts.items()})


def step_flops(shape: ModelShape, batch: MicroBatch, checkpointing: Checkpointing, passes: int = 1) -> Flops:
    """Return the FLOPs of the forward and backward pass of a batch, which may be cut into several passes."""
    forward = gradients = attention = recomputed = 0
    adapters = _embedding(shape, batch, passes)
    products = _attention_product(shape, batch)
    has_gradient = bool(shape.embedding.trained)
    for index, layer in enumerate(shape.layers):
        kind = layer_checkpointing(checkpointing, index)
        groups = _groups(layer, has_gradient)
        has_gradient, attends = has_gradient or is_trained(*layer.linears), groups[1][1]
        for group, x_has_gradient in groups:
            forward += forward_flops(group, batch)
            gradients += forward_flops(group, batch) * x_has_gradient
            adapters += adapter_forward_flops(group, batch, passes)
            adapters += adapter_backward_flops(group, batch, x_has_gradient, passes)
        attention += (2 + 5 * attends) * products
        if kind != "none" and has_gradient:
            recomputed_groups = [group for group, _ in (groups if kind == "layer" else groups[2:])]
            recomputed += sum(forward_flops(group, batch) for group in recomputed_groups)
            recomputed += 2 * products * (kind == "layer")
            recomputed += sum(adapter_forward_flops(group, batch, passes) for group in recomputed_groups)
    has_gradient = has_gradient or bool(shape.norm.trained)
    head, head_batch = (shape.head,), replace(batch, sequences=1, length=batch.trained)
    adapters += adapter_forward_flops(head, head_batch, passes)
    adapters += adapter_backward_flops(head, head_batch, has_gradient, passes)
    of_head = forward_flops(head, head_batch) * (1 + has_gradient)
    return Flops(forward, gradients, adapters, attention, of_head, recomputed)


def _groups(layer: LayerShape, has_gradient: bool) -> list[tuple[Sequence[LinearShape], bool]]:
    """Return the groups of layers that read the same x, each with whether x has a gradient."""
    mixed = has_gradient or is_trained(*layer.qkv)
    stream = mixed or layer.output.is_trained
    hidden = stream or is_trained(*layer.gate_up)
    return [(layer.qkv, has_gradient), ((layer.output,), mixed), (layer.gate_up, stream), ((layer.down,), hidden)]


def _embedding(shape: ModelShape, batch: MicroBatch, passes: int) -> int:
    """Return the FLOPs of the embedding's low-rank update: u Bᵀ, dy B and dyᵀ u; A is looked up, not multiplied."""
    size, hidden = shape.embedding, shape.config.hidden_size
    per_pass = size.variant.flops(size.rank, shape.config.vocab_size, hidden)
    if size.variant.is_dense:  # B A, and the gradients of both; the lookup multiplies nothing
        return passes * 3 * per_pass
    return 2 * 3 * batch.tokens * size.product_rank * hidden + passes * per_pass


def _attention_product(shape: ModelShape, batch: MicroBatch) -> int:
    """Return the FLOPs of one attention product, such as q kᵀ; a block of queries sees no later keys."""
    pairs = sum((last - first) * seen for first, last, seen in query_blocks(batch.length, batch.length))
    return 2 * batch.sequences * shape.config.num_attention_heads * shape.config.head_dim * pairs
