"""The moments of a training step that can be its peak, and the memory in use at each.

Memory is highest at one of four moments: the loss, the backward pass of an MLP or of an attention (in the last layer,
or in a layer that recomputes its activations), or the optimizer's step. A table of the vocabulary that is trained in
full adds a fifth, its gradient. Each function below names the tensors that are alive there besides the kept ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lorakit_kernels.cpu.linear_4bit import bands

from ..layers.frozen.linear_cross_entropy import CHUNK_ELEMENTS
from ..models.decoder.attention import QUERY_BLOCK
from ..training.activations import SMALLEST_OFFLOADED
from ..training.optimizers import OPTIMIZERS
from .activations import (
    Checkpointing,
    embedding_activations,
    head_activations,
    layer_activations,
    layer_checkpointing,
    rotary_tables,
)
from .adapter_size import FP32
from .groups import MicroBatch, is_fused
from .shape import LayerShape, LinearShape, ModelShape


@dataclass(frozen=True)
class Moment:
    """The bytes in use at a moment of a step, besides those in use all the time.

    Attributes:
        name: "the loss", "backward of the MLP of layer 29", ...
        activations: tensors for the backward pass, kept or recomputed.
        workspace: tensors that live within one operation, and activation gradients.
        logits: a chunk of logits and the loss's tensors for it.
        gradients: gradients of the adapter.
    """

    name: str
    activations: int
    workspace: int
    logits: int
    gradients: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.activations + self.workspace + self.logits + self.gradients


@dataclass(frozen=True)
class Step:
    """The settings of a step that affect its memory.

    Attributes:
        checkpointing: the parts that are recomputed.
        micro_batches: number of equal micro-batches, whose gradients are added up.
        optimizer: name of the optimizer.
        offloads: whether kept activations leave the GPU between the two passes.
    """

    checkpointing: Checkpointing
    micro_batches: int
    optimizer: str
    offloads: bool


def moments(shape: ModelShape, batch: MicroBatch, step: Step) -> Iterator[Moment]:
    """Yield the moments that can be the peak of a step."""
    layers = layer_activations(shape, batch)
    kinds = [layer_checkpointing(step.checkpointing, index) for index in range(len(layers))]
    kept = [_staying(layer.kept(kind), step) for layer, kind in zip(layers, kinds, strict=True)]
    gradients = [FP32 * sum(sum(linear.adapter.sizes) for linear in layer.linears) for layer in shape.layers]
    of_table, of_head = (FP32 * sum(size.sizes) for size in (shape.embedding, shape.head.adapter))
    of_head += FP32 * sum(shape.norm.sizes)
    if shape.head.adapter.follows_embedding == "copy":
        of_head += of_table  # the head's gradient, to which the embedding's is added
    every = FP32 * sum(shape.trained)
    earlier = every if step.micro_batches > 1 else 0  # the accumulated gradients of earlier micro-batches
    band = band_bytes(shape, batch)
    stays = band if batch.on_cpu else 0  # the CPU's buffer stays; a GPU's tensor is freed
    below = _staying(embedding_activations(shape, batch), step)
    if any(layer.attends for layer in layers):
        below += _staying(rotary_tables(shape, batch), step)
    of_loss = sum(head_activations(shape, batch, layers[-1].has_gradient))  # just made, not offloaded yet
    at_loss = below + sum(kept) + of_loss
    yield Moment("the loss", at_loss, stays, _logits(shape, batch), earlier)
    if shape.head.trains_weight:
        workspace = stays + _head_backward(shape, batch)
        yield Moment("backward of the head", at_loss, workspace, 0, max(earlier, of_head))
    for index, (layer, activations, kind) in enumerate(zip(shape.layers, layers, kinds, strict=True)):
        if not activations.has_gradient:
            continue
        stream = activations.stream
        # A recomputed part has an output, and its input is in memory even if its operations do not keep it.
        recomputed_output = 0 if kind == "none" else stream
        first, second = sum(activations.first_half), sum(activations.second_half)
        if kind == "layer":
            first += 0 if activations.keeps_input else stream
        elif kind == "mlp":
            second += 0 if activations.keeps_middle else stream
        others = below + sum(kept[:index])
        added = max(earlier, sum(gradients[index:]) + of_head)
        workspace = band + recomputed_output + _mlp_backward(layer, batch)
        yield Moment(f"backward of the MLP of layer {index}", others + first + second, workspace, 0, added)
        workspace = band + (recomputed_output if kind == "layer" else 0) + _attention_backward(shape, layer, batch)
        yield Moment(f"backward of the attention of layer {index}", others + first, workspace, 0, added)
    if shape.embedding.trained:
        workspace = stays + _embedding_backward(shape, batch)
        yield Moment("backward of the embedding", below, workspace, 0, every)
    update = OPTIMIZERS[step.optimizer].step_bytes(max(shape.trained))  # it updates one parameter at a time
    yield Moment("the optimizer's step", 0, stays + update, 0, every)


def _staying(tensors: Iterable[int], step: Step) -> int:
    """Return the bytes of the kept tensors that are not offloaded."""
    return sum(size for size in tensors if not step.offloads or size < SMALLEST_OFFLOADED)


def optimizer_bytes(shape: ModelShape, optimizer: str) -> int:
    """Return the bytes of the optimizer's state, over all trained matrices."""
    state_bytes = OPTIMIZERS[optimizer].state_bytes
    return sum(sum(state_bytes(size).values()) for size in shape.trained)


def band_bytes(shape: ModelShape, batch: MicroBatch) -> int:
    """Return the bytes of the buffer (on a GPU, the tensor) for dequantized 4-bit weights."""
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
    """Return the bytes of a chunk of logits, which becomes its own gradient, and of the trained hidden states.

    A head that the adapter changes computes all logits at once, in the dtype of the products and in fp32, besides the
    kept log probabilities. Its backward pass has the gradient in fp32, twice, and in the dtype of the products.
    """
    vocabulary, item = shape.head.out_features, batch.dtype.itemsize
    hidden = batch.trained * shape.config.hidden_size * item
    if shape.head.is_trained or shape.head.adapter.follows_embedding:
        return batch.trained * vocabulary * (item + (FP32 if item < FP32 else 0) + FP32)
    rows = min(batch.trained, max(1, CHUNK_ELEMENTS // vocabulary))
    return hidden + rows * (vocabulary + shape.config.hidden_size) * item


def _head_backward(shape: ModelShape, batch: MicroBatch) -> int:
    """Return the bytes of the gradients of logits, hidden states and the head's weight, the last before its cast."""
    item = batch.dtype.itemsize
    rows = batch.trained * (shape.head.out_features + shape.config.hidden_size) * item
    return rows + shape.head.elements * item


def _embedding_backward(shape: ModelShape, batch: MicroBatch) -> int:
    """Return the bytes of the stream's gradient and, for a table trained in full, its gradient before cast and sum."""
    config, stream = shape.config, batch.nbytes(shape.config.hidden_size)
    if not shape.embedding.trains("weight"):
        return stream
    elements, item = config.vocab_size * config.hidden_size, batch.dtype.itemsize
    is_added = shape.head.adapter.follows_embedding is not None
    return stream + elements * ((item if item < FP32 else 0) + FP32 * is_added)


def _mlp_backward(layer: LayerShape, batch: MicroBatch) -> int:
    """Return the bytes at the activation's gradient: the stream's gradient, dh, and dgate and dup of the inputs.

    With DoRA, also the inputs' gradients times the gains.
    """
    wide, narrow, inputs = layer.down.in_features, layer.down.out_features, len(layer.gate_up)
    taken = batch.nbytes(narrow, (1 + inputs) * wide)
    if is_fused(layer.gate_up, batch) and any(linear.adapter.variant.has_gain for linear in layer.gate_up):
        taken = max(taken, batch.nbytes(2 * narrow, 2 * inputs * wide))
    return taken + _copied((*layer.gate_up, layer.down), batch)


def _attention_backward(shape: ModelShape, layer: LayerShape, batch: MicroBatch) -> int:
    """Return the bytes at the last block of queries: its P, dP and dS, the gradients of q, k and v, and the stream's.

    The CPU sums dK and dV in fp32, and has freed the result of attention if it was kept. A GPU's kernel has no scores
    in memory and keeps its result.
    """
    queries, keys = layer.qkv[0].out_features, layer.qkv[1].out_features
    stream_and_mixed = batch.nbytes(shape.config.hidden_size, 2 * queries) + _copied((*layer.qkv, layer.output), batch)
    if not batch.on_cpu:
        return stream_and_mixed + batch.nbytes(2 * keys)
    if layer.output.adapter.rank:
        stream_and_mixed -= batch.nbytes(queries)
    wide = batch.tokens * FP32 * 2 * keys
    block = min(QUERY_BLOCK, batch.length)
    scores = batch.sequences * shape.config.num_attention_heads * block * batch.length * batch.dtype.itemsize
    return stream_and_mixed + wide + 3 * scores


def _copied(linears: tuple[LinearShape, ...], batch: MicroBatch) -> int:
    """Return the bytes of the gradient of a weight trained in full, before its cast.

    For an update of the weight's size: its gradient, the base weight and their product.
    """
    elements = [linear.elements for linear in linears if linear.trains_weight]
    elements += [3 * linear.elements for linear in linears if linear.adapter.rank and linear.adapter.variant.is_dense]
    return max(elements, default=0) * batch.dtype.itemsize
