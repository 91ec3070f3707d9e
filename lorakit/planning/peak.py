"""The moments of a training step that can be its peak, and what is in memory at each.

Memory is highest in one of four places: while the loss is computed, in the backward pass of an MLP or of an attention
(of the last layer, or of a layer that computes its activations again), or at the optimizer's step. Each function below
names the tensors that are alive there besides what was kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorakit_kernels.cpu.linear import bands
from lorakit_kernels.reference_training import STATE_BLOCK_SIZE

from ..layers.linear_cross_entropy import CHUNK_ELEMENTS
from ..models.attention import QUERY_BLOCK
from ..training.optimizers import SMALLEST_8BIT
from .activations import (
    FP32,
    Checkpointing,
    MicroBatch,
    head_activations,
    layer_activations,
    layer_checkpointing,
)
from .shape import LayerShape, LinearShape, ModelShape


def _moment_in_8_bits(size: int) -> int:
    return size + FP32 * -(-size // STATE_BLOCK_SIZE) if size >= SMALLEST_8BIT else FP32 * size


_STATE = {  # optimizer -> bytes that it keeps for a matrix of so many elements; AdamW counts the steps of each
    "adamw": lambda size: 2 * FP32 * size + FP32,
    "adamw_8bit": lambda size: 2 * _moment_in_8_bits(size) + FP32,
    "lion": lambda size: FP32 * size,
}


@dataclass(frozen=True)
class Moment:
    """What is in memory at a moment of a step, in bytes, besides what is there all the time.

    Attributes:
        name: "the loss", "backward of the MLP of layer 29", ...
        activations: kept for the backward pass, by the forward pass or by computing it again.
        workspace: tensors that live within one operation, and gradients on their way down.
        logits: a chunk of logits and what the loss makes of it.
        gradients: of the adapter.
    """

    name: str
    activations: int
    workspace: int
    logits: int
    gradients: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.workspace + self.logits + self.gradients


def moments(shape: ModelShape, batch: MicroBatch, checkpointing: Checkpointing, micro_batches: int) -> Iterator[Moment]:
    """Yield the moments that can be the peak of a step of several equal micro-batches."""
    layers = layer_activations(shape, batch)
    kinds = [layer_checkpointing(checkpointing, index) for index in range(len(layers))]
    kept = [layer.kept(kind) for layer, kind in zip(layers, kinds, strict=True)]
    gradients = [FP32 * sum(sum(linear.adapter) for linear in layer.linears) for layer in shape.layers]
    of_head = FP32 * sum(shape.head.adapter)
    every = sum(gradients) + of_head
    earlier = every if micro_batches > 1 else 0  # of micro-batches before: they are added up
    band = band_bytes(shape, batch)
    stays = band if batch.on_cpu else 0  # the buffer; a GPU's tensor is gone
    at_loss = sum(kept) + head_activations(shape, batch)
    yield Moment("the loss", at_loss, stays, _logits(shape, batch), earlier)
    tables = 2 * batch.rows(shape.config.head_dim)
    for index, (layer, activations, kind) in enumerate(zip(shape.layers, layers, kinds, strict=True)):
        if not activations.has_gradient:
            continue
        stream = activations.stream
        # What was computed again has an output, and its input is there whether or not its operations keep it.
        again = 0 if kind == "none" else stream
        first, second = activations.first_half, activations.second_half
        if kind == "layer":
            first += 0 if activations.keeps_input else stream
        elif kind == "mlp":
            second += 0 if activations.keeps_middle else stream
        below = sum(kept[:index]) + tables
        added = max(earlier, sum(gradients[index:]) + of_head)
        workspace = band + again + _mlp_backward(layer, batch)
        yield Moment(f"backward of the MLP of layer {index}", below + first + second, workspace, 0, added)
        workspace = band + (again if kind == "layer" else 0) + _attention_backward(shape, layer, batch)
        yield Moment(f"backward of the attention of layer {index}", below + first, workspace, 0, added)
    yield Moment("the optimizer's step", 0, stays, 0, every)


def optimizer_bytes(shape: ModelShape, optimizer: str) -> int:
    """Return the bytes of the optimizer's state, over all trained matrices."""
    return sum(_STATE[optimizer](size) for size in shape.adapter)


def band_bytes(shape: ModelShape, batch: MicroBatch) -> int:
    """Return the bytes of the buffer, or on a GPU of the tensor, that 4-bit weights are dequantized into."""
    item = batch.dtype.itemsize
    quantized = [linear for linear in (*shape.linears, shape.head) if linear.format]
    if not batch.on_cpu:
        return max((linear.elements * item for linear in quantized), default=0)
    return max((_widest_band(linear, item) for linear in quantized), default=0)


def _widest_band(linear: LinearShape, item: int) -> int:
    rows, columns = linear.out_features, linear.in_features
    return max(
        (last - first) * across * item
        for along, across in ((rows, columns), (columns, rows))
        for first, last in bands(along, across * item)
    )


def _logits(shape: ModelShape, batch: MicroBatch) -> int:
    """A chunk of logits, which becomes its own gradient, and the trained rows of the hidden states.

    An adapted head takes another path: all logits at once, in the dtype of the products and in fp32, besides the log
    probabilities that are kept; backward the gradient in fp32, twice, and in the dtype of the products.
    """
    vocabulary, item = shape.head.out_features, batch.dtype.itemsize
    hidden = batch.trained * shape.config.hidden_size * item
    if shape.head.rank:
        return batch.trained * vocabulary * (item + (FP32 if item < FP32 else 0) + FP32)
    rows = min(batch.trained, max(1, CHUNK_ELEMENTS // vocabulary))
    return hidden + rows * (vocabulary + shape.config.hidden_size) * item


def _mlp_backward(layer: LayerShape, batch: MicroBatch) -> int:
    """At the gradient of SwiGLU: the stream's gradient, dh, dgate and dup."""
    return batch.rows(layer.down.out_features, 3 * layer.down.in_features)


def _attention_backward(shape: ModelShape, layer: LayerShape, batch: MicroBatch) -> int:
    """At the last block of queries: probabilities, dP and dS of it, the gradients of q, k and v, and the stream's.

    On the CPU dK and dV are summed in fp32, and the kept result of attention is gone, if it was kept; a GPU's kernel
    has no scores in memory, and keeps its result.
    """
    queries, keys = layer.qkv[0].out_features, layer.qkv[1].out_features
    stream_and_mixed = batch.rows(shape.config.hidden_size, 2 * queries)
    if not batch.on_cpu:
        return stream_and_mixed + batch.rows(2 * keys)
    if layer.output.rank:
        stream_and_mixed -= batch.rows(queries)
    wide = batch.tokens * FP32 * 2 * keys
    block = min(QUERY_BLOCK, batch.length)
    scores = batch.sequences * shape.config.num_attention_heads * block * batch.length * batch.dtype.itemsize
    return stream_and_mixed + wide + 3 * scores
