"""Activations that the forward pass keeps for the backward pass, layer by layer: the bytes of each tensor.

The counts follow `models.decoder` (blocks, recompute, attention) and `lorakit_kernels.ops`; `groups` has the linear
layers. The tests count the same bytes with hooks on real decoders, so they catch a change there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .adapter_size import FP32
from .groups import MicroBatch, recomputes_input, saved_by_group
from .shape import LayerShape, LinearShape, ModelShape

Checkpointing = Literal["none", "mlp", "layer"] | int
_INT64 = 8


@dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """The activations that a layer keeps without checkpointing.

    Attributes:
        stream: bytes of the hidden states, (tokens, hidden), at the layer's input or between its halves.
        attention, mlp: bytes of each tensor of the two halves, without those streams.
        keeps_input, keeps_middle: whether the stream there is kept; it is not if nothing needs its gradient.
        attends: whether queries, keys and values have a gradient.
        has_gradient: whether the layer's output has a gradient.
    """

    stream: int
    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    keeps_input: bool
    keeps_middle: bool
    attends: bool
    has_gradient: bool

    @property
    def first_half(self) -> tuple[int, ...]:
        """The tensors that attention keeps, its input included."""
        return (*self.attention, *[self.stream] * self.keeps_input)

    @property
    def second_half(self) -> tuple[int, ...]:
        """The tensors that the MLP keeps, its input included."""
        return (*self.mlp, *[self.stream] * self.keeps_middle)

    def kept(self, checkpointing: Literal["none", "mlp", "layer"]) -> tuple[int, ...]:
        """Return the tensors kept between the two passes; of a recomputed part, its input."""
        if checkpointing == "none":
            return self.first_half + self.second_half
        of_input = (self.stream,) * self.has_gradient
        return self.first_half + of_input if checkpointing == "mlp" else of_input


def layer_checkpointing(how: Checkpointing, index: int) -> Literal["none", "mlp", "layer"]:
    """Return which part of layer `index` is recomputed; see `Decoder.set_checkpointing`."""
    if isinstance(how, str):
        return how
    return "none" if (index + 1) % how else "layer"


def layer_activations(shape: ModelShape, batch: MicroBatch) -> list[LayerActivations]:
    """Return the activations of each layer."""
    has_gradient, result = bool(shape.embedding.trained), []
    for layer in shape.layers:
        result.append(_layer(shape, layer, batch, has_gradient))
        has_gradient = result[-1].has_gradient
    return result


def embedding_activations(shape: ModelShape, batch: MicroBatch) -> list[int]:
    """Return the bytes that a trained embedding keeps: the ids and, for a low-rank update, its factors."""
    size, hidden, item = shape.embedding, shape.config.hidden_size, batch.dtype.itemsize
    ids = _INT64 * batch.tokens
    if size.trains("trainable_tokens_delta"):
        return [ids, batch.tokens]  # the row of each token, and whether it is a trained one
    if not size.rank:
        return [ids] if size.trained else []
    if size.variant.is_dense:
        return [ids, FP32 * hidden * size.rank]  # s B
    tensors = [ids, FP32 * batch.tokens * size.product_rank]  # in fp32, as A and B are
    if size.variant.joins_matrices:
        tensors.append(FP32 * hidden * size.product_rank)  # [B, -B0]
    if size.variant.has_gain:
        vectors = [FP32 * hidden, item * hidden]  # the norms, and the gain
        tensors += [*vectors, *[batch.nbytes(hidden)] * 2]  # the table's output, and the update
    return tensors


def rotary_tables(shape: ModelShape, batch: MicroBatch) -> list[int]:
    """Return the bytes of the rotary tables that all layers share: cosines and sines."""
    return [batch.nbytes(shape.config.head_dim)] * 2


def head_activations(shape: ModelShape, batch: MicroBatch, has_gradient: bool) -> list[int]:
    """Return the bytes of each tensor kept from the final norm to the loss.

    Args:
        has_gradient: whether the last layer's output has a gradient.
    """
    hidden, item, head = shape.config.hidden_size, batch.dtype.itemsize, shape.head
    norm, trains_norm = [], bool(shape.norm.trained)
    if has_gradient or trains_norm:
        norm = [batch.nbytes(hidden), FP32 * batch.tokens]
    if trains_norm and item < FP32:
        norm.append(hidden * item)  # its weight, cast
    has_gradient = has_gradient or trains_norm
    mask = [batch.tokens] * has_gradient
    head_batch = replace(batch, sequences=1, length=batch.trained)
    if not (head.is_trained or head.adapter.follows_embedding):
        return [*norm, *mask, head_batch.nbytes(hidden)]  # the rows' gradient
    log_probs = [FP32 * batch.trained * head.out_features, _INT64 * batch.trained]  # and the targets
    return norm + mask + saved_by_group((head,), head_batch, has_gradient) + _tied_tokens(shape, batch) + log_probs


def _tied_tokens(shape: ModelShape, batch: MicroBatch) -> list[int]:
    """Return the bytes kept for writing trained rows into a tied head's table: their indices, and the rows if cast."""
    elements = dict(shape.embedding.trained).get("trainable_tokens_delta", 0)
    if not elements or not shape.head.adapter.follows_embedding:
        return []
    indices, item = _INT64 * (elements // shape.config.hidden_size), batch.dtype.itemsize
    return [indices, elements * item] if item < FP32 else [indices]


def _layer(shape: ModelShape, layer: LayerShape, batch: MicroBatch, before: bool) -> LayerActivations:
    config, statistics = shape.config, FP32 * batch.tokens
    query, key, value = layer.qkv
    attention = [statistics] * before
    is_normed = config.qk_norm  # these norms keep q and k
    attention += saved_by_group(layer.qkv, batch, before, recomputes_x=True, outputs_kept=(is_normed, is_normed, True))
    for linear in (query, key) if is_normed else ():
        if before or linear.is_trained:
            attention += [batch.nbytes(linear.out_features), statistics * linear.out_features // config.head_dim]
    if attends := before or is_trained(*layer.qkv):
        attention += [batch.nbytes(linear.out_features) for linear in (query, key, value)]
        if not batch.on_cpu:  # PyTorch's attention also keeps its result and the logsumexp of each row
            attention += [batch.nbytes(query.out_features), statistics * config.num_attention_heads]
    mixed_is_kept = attends and not batch.on_cpu
    attention += saved_by_group((layer.output,), batch, attends, recomputes_x=mixed_is_kept)
    middle = before or is_trained(*layer.qkv, layer.output)
    mlp = [statistics] * middle
    mlp += saved_by_group(layer.gate_up, batch, middle, recomputes_x=True, outputs_kept=[True] * len(layer.gate_up))
    gated = middle or is_trained(*layer.gate_up)
    mlp += saved_by_group((layer.down,), batch, gated, recomputes_x=True)
    if gated or recomputes_input((layer.down,), batch):  # for swiglu's gradient, or to recompute its output
        mlp += [batch.nbytes(linear.out_features) for linear in layer.gate_up]
    return LayerActivations(
        stream=batch.nbytes(config.hidden_size),
        attention=tuple(attention),
        mlp=tuple(mlp),
        keeps_input=before or recomputes_input(layer.qkv, batch),
        keeps_middle=middle or recomputes_input(layer.gate_up, batch),
        attends=attends,
        has_gradient=gated or layer.down.is_trained,
    )


def is_trained(*linears: LinearShape) -> bool:
    """Return whether the adapter trains a parameter in any of these layers."""
    return any(linear.is_trained for linear in linears)
