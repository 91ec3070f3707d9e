"""The two blocks of a decoder layer, attention and the gated MLP, as a family uses them unless it brings its own.

A family's own block derives from one of these, or has the same methods and class attributes. The names of its linear
layers are those of the checkpoint, since adapter files name them too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from ..layers import Again, RMSNorm, apply_rope, linear_together, swiglu
from .attention import Layout
from .cache import KVCache
from .shape import DecoderShape


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads (Ainslie et al., arXiv:2305.13245).

    Attributes:
        inputs: names of the layers that read the hidden states, for queries, keys and values.
        output: name of the layer that reads what attention has mixed.
        norm: class of the norms of queries and keys, where the shape asks for them.
    """

    inputs: ClassVar[tuple[str, str, str]] = ("q_proj", "k_proj", "v_proj")
    output: ClassVar[str] = "o_proj"
    norm: ClassVar[type[RMSNorm]] = RMSNorm

    def __init__(self, shape: DecoderShape, index: int) -> None:
        super().__init__()
        self.index, self.head_dim, self.qk_norm = index, shape.head_dim, shape.qk_norm
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=shape.output_bias)
        if shape.qk_norm:
            self.q_norm = self.norm(shape.head_dim, shape.rms_norm_eps)
            self.k_norm = self.norm(shape.head_dim, shape.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        rope: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
        again: Again | None = None,
    ) -> Tensor:
        mixed = layout.attend(*self.project(x, rope, again), self.index, cache)
        result: Tensor = self.o_proj(mixed)
        return result

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor], again: Again | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (tokens, heads, head_dim), keys and values (tokens, kv_heads, head_dim), rotated."""
        projected = linear_together(x, self.q_proj, self.k_proj, self.v_proj, again=again)
        q, k, v = (y.view(len(x), -1, self.head_dim) for y in projected)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return *apply_rope(q, k, *rope), v


class MLP(nn.Module):
    """The gated feed-forward layer: down(gated(gate(x), up(x))), with silu(gate) * up where a family does not differ.

    Attributes:
        inputs: names of the layers that read the hidden states, each as wide as the intermediate size.
        output: name of the layer that leads back to them.
        gated: what is made of the inputs' results, tensors (tokens, intermediate) in and out.
    """

    inputs: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj")
    output: ClassVar[str] = "down_proj"
    gated: ClassVar[Callable[[Tensor, Tensor], Tensor]] = staticmethod(swiglu)

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=shape.mlp_bias)

    def forward(self, x: Tensor, again: Again | None = None) -> Tensor:
        gate_and_up = linear_together(x, self.gate_proj, self.up_proj, again=again)
        hidden = self.gated(*gate_and_up)
        (result,) = linear_together(hidden, self.down_proj, again=(self.gated, gate_and_up))
        return result
