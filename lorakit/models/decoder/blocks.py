"""The two blocks of a decoder layer, attention and the MLP, for every family that does not bring its own.

A family's own block derives from one of these. Its linear layers have the checkpoint's names, because adapter files and
target modules use them too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from lorakit_kernels import swiglu
from torch import Tensor, nn

from ...layers import Recompute, RMSNorm, apply_rope, linear_together
from .attention import Layout
from .cache import KVCache
from .shape import DecoderShape


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads (Ainslie et al., arXiv:2305.13245).

    Shapes:
        x (tokens, hidden) -> (tokens, hidden); rope: cosines and sines, (tokens, head_dim) each

    Attributes:
        inputs: names of the layers that read the hidden states, for queries, keys and values.
        output: name of the layer that reads the result of attention.
        norm: class of the norms of queries and keys, used where the decoder's shape has `qk_norm`.
    """

    inputs: ClassVar[tuple[str, str, str]] = ("q_proj", "k_proj", "v_proj")
    output: ClassVar[str] = "o_proj"
    norm: ClassVar[type[RMSNorm]] = RMSNorm

    def __init__(self, shape: DecoderShape, index: int) -> None:
        super().__init__()
        self.index, self.head_dim, self.qk_norm = index, shape.head_dim, shape.qk_norm
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        for name, size in zip(self.inputs, (queries, keys, keys), strict=True):
            self.add_module(name, nn.Linear(shape.hidden_size, size, bias=shape.qkv_bias))
        self.add_module(self.output, nn.Linear(queries, shape.hidden_size, bias=shape.output_bias))
        if shape.qk_norm:
            self.q_norm = self.norm(shape.head_dim, shape.rms_norm_eps)
            self.k_norm = self.norm(shape.head_dim, shape.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        rope: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
        recompute: Recompute | None = None,
    ) -> Tensor:
        return self.project_back(layout.attend(*self.project(x, rope, recompute), self.index, cache))

    def project(
        self, x: Tensor, rope: tuple[Tensor, Tensor], recompute: Recompute | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (tokens, heads, head_dim), keys and values (tokens, kv_heads, head_dim), rotated."""
        projected = linear_together(x, *(getattr(self, name) for name in self.inputs), recompute=recompute)
        q, k, v = (y.view(len(x), -1, self.head_dim) for y in projected)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return *apply_rope(q, k, *rope), v

    def project_back(self, mixed: Tensor) -> Tensor:
        """Project the result of attention: (tokens, heads * head_dim) -> (tokens, hidden)."""
        result: Tensor = getattr(self, self.output)(mixed)
        return result


class MLP(nn.Module):
    """The gated feed-forward layer: down_proj(silu(gate_proj(x)) * up_proj(x)), unless a family says otherwise.

    Shapes:
        x (tokens, hidden) -> (tokens, hidden)

    Attributes:
        inputs: names of the layers that read the hidden states, each as wide as the intermediate size.
        output: name of the layer that maps back to the hidden size.
        activation: combines the results of the inputs, (tokens, intermediate) each, into one such tensor.
    """

    inputs: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj")
    output: ClassVar[str] = "down_proj"
    activation: ClassVar[Callable[..., Tensor]] = staticmethod(swiglu)

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        for name in self.inputs:
            self.add_module(name, nn.Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias))
        self.add_module(self.output, nn.Linear(shape.intermediate_size, shape.hidden_size, bias=shape.mlp_bias))

    def forward(self, x: Tensor, recompute: Recompute | None = None) -> Tensor:
        projected = linear_together(x, *(getattr(self, name) for name in self.inputs), recompute=recompute)
        activated = self.activation(*projected)
        (result,) = linear_together(activated, getattr(self, self.output), recompute=(self.activation, projected))
        return result
