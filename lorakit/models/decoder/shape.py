"""`DecoderShape`: the sizes and switches that a decoder is built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DecoderShape:
    """Sizes and switches of a decoder; field names follow Hugging Face's config.json where it has them.

    Attributes:
        architecture: the name in config.json, such as "LlamaForCausalLM".
        qkv_bias: whether the query, key and value projections have a bias.
        output_bias: whether the attention's output projection has one.
        mlp_bias: whether the feed-forward projections have one.
        qk_norm: whether each head's query and key are normalized (RMSNorm), as in Qwen3.
        sliding_window: number of tokens over which attention looks back, or None.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence: the context, or the sliding window if that is shorter."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)
