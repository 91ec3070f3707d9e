"""What the forward pass keeps for the backward pass, layer by layer, in bytes.

Written off `models.decoder`, `models.recompute`, `models.attention`, `layers.lora_linear`, `lorakit_kernels.gradients`
and `layers.linear_cross_entropy`; the tests count the same bytes with hooks on real decoders, so that a change there
shows here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .shape import LayerShape, LinearShape, ModelShape

Checkpointing = Literal["none", "mlp", "layer"] | int
FP32 = 4  # bytes of an element


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes: sequences of one length, of which some tokens are trained.

    Attributes:
        sequences, length: their number and tokens.
        trained: tokens that count in the loss.
        dtype: of the products.
        dropout: whether the adapters' inputs are dropped out, which takes a path of separate operations.
        on_cpu: whether the CPU computes, whose attention differs.
    """

    sequences: int
    length: int
    trained: int
    dtype: torch.dtype
    dropout: bool
    on_cpu: bool

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.sequences * self.length

    def rows(self, *widths: int) -> int:
        """Bytes of (tokens, width) matrices in the dtype of the products."""
        return self.tokens * sum(widths) * self.dtype.itemsize


@dataclass(frozen=True)
class LayerActivations:
    """What a layer keeps if nothing is computed again.

    Attributes:
        stream: bytes of the hidden states, (tokens, hidden), at the layer's input or between its halves.
        attention, mlp: of the two halves, without those streams.
        keeps_input, keeps_middle: whether the stream there is kept; not where nothing needs its gradient.
        has_gradient: whether the layer's output has a gradient.
    """

    stream: int
    attention: int
    mlp: int
    keeps_input: bool
    keeps_middle: bool
    has_gradient: bool

    @property
    def first_half(self) -> int:
        """Bytes that attention keeps, with its input."""
        return self.attention + self.stream * self.keeps_input

    @property
    def second_half(self) -> int:
        """Bytes that the MLP keeps, with its input."""
        return self.mlp + self.stream * self.keeps_middle

    def kept(self, checkpointing: Literal["none", "mlp", "layer"]) -> int:
        """Bytes kept between the two passes; of what is computed again, that is its input."""
        if checkpointing == "none":
            return self.first_half + self.second_half
        if checkpointing == "mlp":
            return self.first_half + self.stream * self.has_gradient
        return self.stream * self.has_gradient


def layer_checkpointing(how: Checkpointing, index: int) -> Literal["none", "mlp", "layer"]:
    """Return what layer `index` computes again; see `Decoder.set_checkpointing`."""
    if isinstance(how, str):
        return how
    return "none" if (index + 1) % how else "layer"


def layer_activations(shape: ModelShape, batch: MicroBatch) -> list[LayerActivations]:
    """Return what each layer keeps."""
    has_gradient, result = False, []  # the embedding is frozen
    for layer in shape.layers:
        result.append(_layer(shape, layer, batch, has_gradient))
        has_gradient = result[-1].has_gradient
    return result


def head_activations(shape: ModelShape, batch: MicroBatch) -> int:
    """Return the bytes kept from the final norm to the loss, and the rotary tables, which all layers share."""
    hidden, item = shape.config.hidden_size, batch.dtype.itemsize
    tables = 2 * batch.rows(shape.config.head_dim)
    norm = batch.rows(hidden) + FP32 * batch.tokens
    trained = batch.tokens + batch.trained * hidden * item  # the mask; the rows' gradient, or the rows for the head
    if not shape.head.rank:
        return tables + norm + trained
    log_probs = batch.trained * (FP32 * shape.head.out_features + 8)  # 8: the targets
    return tables + norm + trained + batch.trained * shape.head.rank * item + log_probs


def _layer(shape: ModelShape, layer: LayerShape, batch: MicroBatch, has_gradient: bool) -> LayerActivations:
    config, statistics, before = shape.config, FP32 * batch.tokens, has_gradient
    queries, keys = layer.qkv[0].out_features, layer.qkv[1].out_features
    attention = statistics * before + _group(layer.qkv, batch, before, again=True)
    if config.qk_norm:
        for linear in layer.qkv[:2]:
            if before or linear.rank:
                attention += batch.rows(linear.out_features)
                attention += FP32 * batch.tokens * linear.out_features // config.head_dim
    if has_gradient := before or is_adapted(*layer.qkv):
        attention += batch.rows(queries, keys, keys)
        if not batch.on_cpu:  # PyTorch's keeps its result, too, and the logsumexp of each row
            attention += batch.rows(queries) + statistics * config.num_attention_heads
    mixed_is_kept = has_gradient and not batch.on_cpu
    attention += _group((layer.output,), batch, has_gradient, again=mixed_is_kept)
    middle = has_gradient or layer.output.rank > 0
    mlp = statistics * middle + _group(layer.gate_up, batch, middle, again=True)
    has_gradient = middle or is_adapted(*layer.gate_up)
    mlp += _group((layer.down,), batch, has_gradient, again=True)
    if has_gradient or _is_fused((layer.down,), batch):  # for swiglu, or to compute what it gave again
        mlp += batch.rows(*(linear.out_features for linear in layer.gate_up))
    return LayerActivations(
        stream=batch.rows(config.hidden_size),
        attention=attention,
        mlp=mlp,
        keeps_input=before or _is_fused(layer.qkv, batch),
        keeps_middle=middle or _is_fused(layer.gate_up, batch),
        has_gradient=has_gradient or layer.down.rank > 0,
    )


def is_adapted(*linears: LinearShape) -> bool:
    """Return whether any of these layers has an adapter."""
    return any(linear.rank for linear in linears)


def _is_fused(group: Sequence[LinearShape], batch: MicroBatch) -> bool:
    """Return whether `linear_together` makes one function of a group, which can compute its x again."""
    return not batch.dropout and all(linear.rank for linear in group)


def _group(group: Sequence[LinearShape], batch: MicroBatch, has_gradient: bool, again: bool) -> int:
    """Return the bytes that layers keep which read the same x: x, and u = x Aᵀ of each adapter.

    Args:
        has_gradient: whether x has one.
        again: whether x is computed again where the group is one function, or is kept by something else anyway.
    """
    adapted = [linear for linear in group if linear.rank]
    if not adapted:
        return 0
    ranks = batch.rows(*(linear.rank for linear in adapted))
    if not batch.dropout:
        return ranks + (0 if again and _is_fused(group, batch) else batch.rows(adapted[0].in_features))
    dropped = sum(batch.rows(linear.in_features) * (1 + has_gradient) for linear in adapted)  # x · noise, and noise
    if batch.dtype == torch.float32:
        return ranks + dropped
    # A and B, cast: A to find the gradient of x, B that of u.
    cast = sum((linear.in_features * has_gradient + linear.out_features) * linear.rank for linear in adapted)
    return ranks + dropped + cast * batch.dtype.itemsize
