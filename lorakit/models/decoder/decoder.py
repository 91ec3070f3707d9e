"""One decoder for all model families (`families`), with parameter names as on Hugging Face.

Hidden states travel as a flat (tokens, hidden) matrix, whatever the batch looks like; only attention knows sequences
(`Layout`). A padding-free training batch, a rectangle and one step of generation run through the same code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from lorakit_kernels import is_transformed
from torch import Tensor, nn

from ...errors import ShapeError
from ...layers import RowAware, rope_frequencies, rope_tables
from .attention import Layout
from .cache import KVCache
from .compiled import compiled
from .config import DecoderConfig
from .recompute import recomputed


class DecoderLayer(nn.Module):
    """Attention and MLP, each on the normalized stream and added back to it.

    Shapes:
        x (tokens, hidden) -> (tokens, hidden)
    """

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        family = config.family
        self.self_attn = family.attention(config, index)
        self.mlp = family.mlp(config)
        self.input_layernorm = family.norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = family.norm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing: Literal["none", "mlp", "layer"] = "none"
        self.is_compiled = False

    def forward(self, x: Tensor, layout: Layout, rope: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        if self.checkpointing == "layer":
            return recomputed(self._compute, self, x, layout, rope, cache)
        return self._compute(x, layout, rope, cache)

    def _compute(self, x: Tensor, layout: Layout, rope: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        if self.is_compiled:
            # Attention is not compiled: its blocks and groups follow the lengths, and each set would compile again.
            q, k, v = compiled(DecoderLayer._before_attention)(self, x, rope)
            mixed = layout.attend(q, k, v, self.self_attn.index, cache)
            if self.checkpointing == "mlp":
                x = x + self.self_attn.project_back(mixed)
                return recomputed(partial(compiled(DecoderLayer._feed_forward), self), self, x)
            result: Tensor = compiled(DecoderLayer._after_attention)(self, x, mixed)
            return result
        # The norms keep their input, from which the layers after them recompute their own.
        x = x + self.self_attn(self.input_layernorm(x), layout, rope, cache, recompute=(self.input_layernorm, (x,)))
        return recomputed(self._feed_forward, self, x) if self.checkpointing == "mlp" else self._feed_forward(x)

    def _before_attention(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        norm = self.input_layernorm
        return self.self_attn.project(norm(x), rope, recompute=(norm, (x,)))

    def _after_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        return self._feed_forward(x + self.self_attn.project_back(mixed))

    def _feed_forward(self, x: Tensor) -> Tensor:
        norm = self.post_attention_layernorm
        result: Tensor = x + self.mlp(norm(x), recompute=(norm, (x,)))
        return result


class DecoderStack(nn.Module):
    """Embedding, layers and final norm: everything below the output head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = config.family.norm(config.hidden_size, config.rms_norm_eps)


class Decoder(RowAware, nn.Module):
    """A causal language model of one of the `FAMILIES`.

        logits = model(input_ids)        # (batch, seq) int64 -> (batch, seq, vocab), in the model's dtype

    Attributes:
        config: its shape.
        folder: the checkpoint it was loaded from, or None.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.folder: Path | None = None
        self.model = DecoderStack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states; a copy of the norm that an adapter trains may have another."""
        norm = self.model.norm
        return cast(Tensor, getattr(norm, "base_layer", norm).weight).dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.norm.weight.device

    def set_checkpointing(self, how: Literal["none", "mlp", "layer"] | int) -> None:
        """Choose what the backward pass recomputes instead of keeping it; no result changes.

        Args:
            how: "none": nothing; "mlp": the MLP of every layer with its norm, whose intermediates are the widest;
                "layer": every layer, keeping only its input (Chen et al. 2016, arXiv:1604.06174); a number n: every
                n-th layer.
        """
        for index, layer in enumerate(self.model.layers):
            assert isinstance(layer, DecoderLayer)
            layer.checkpointing = how if isinstance(how, str) else "none" if (index + 1) % how else "layer"

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding table, whose rows `trainable_token_indices` selects."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head, which "all-linear" leaves out."""
        return self.lm_head

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits (batch, seq, vocab) of input_ids (batch, seq) int64."""
        logits: Tensor = self.lm_head(self.hidden_states(input_ids))
        return logits

    def hidden_states(
        self,
        input_ids: Tensor,
        lengths: Sequence[int] | None = None,
        cache: KVCache | None = None,
        shared: int = 0,
    ) -> Tensor:
        """Return the final, normalized hidden states: input_ids' shape + (hidden,).

        Args:
            input_ids: (batch, seq) int64; with `lengths`, (tokens,): sequences laid end to end.
            lengths: of those sequences; positions restart in each and none sees another.
            cache: keys and values of earlier tokens of the same sequences; it is extended by these.
            shared: with `lengths`: number of leading tokens with which every sequence begins, given and computed once;
                `lengths` then counts only the rest of each. The results are as if every sequence were given in full.

        Raises:
            ShapeError: the shape does not fit, a sequence exceeds the context, or a token id is outside the vocabulary.
                Within `use_rows`: there are more or fewer rows than sequences, or `shared` is not 0.
        """
        layout = self._layout(input_ids, lengths, cache, shared)
        with self._rows_laid_out(input_ids, lengths, shared):
            hidden = self._through_layers(input_ids, layout, cache)
        return hidden.view(*input_ids.shape, -1)

    def _rows_laid_out(
        self, input_ids: Tensor, lengths: Sequence[int] | None, shared: int
    ) -> contextlib.AbstractContextManager[None]:
        """Tell the adapted layers which of the flat tokens belong to which row, if rows have adapters of their own."""
        if self.rows is None:
            return contextlib.nullcontext()
        if shared:
            raise ShapeError("rows with adapters of their own cannot share tokens: each computes them differently")
        return self.rows.laid_out([input_ids.shape[1]] * len(input_ids) if lengths is None else lengths)

    def _through_layers(self, input_ids: Tensor, layout: Layout, cache: KVCache | None) -> Tensor:
        x = self.model.embed_tokens(input_ids.reshape(-1))  # (tokens, hidden)
        # Not a buffer: fp32 frequencies must survive .to(torch.bfloat16), and these few numbers cost nothing.
        frequencies = rope_frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        rope = rope_tables(frequencies, layout.positions, x.dtype)
        for layer in self.model.layers:
            x = layer(x, layout, rope, cache)
        if cache is not None:
            cache.length += input_ids.shape[1]
        hidden: Tensor = self.model.norm(x)
        return hidden

    def _layout(self, input_ids: Tensor, lengths: Sequence[int] | None, cache: KVCache | None, shared: int) -> Layout:
        if lengths is not None:
            total = shared + sum(lengths)
            if input_ids.dim() != 1 or total != len(input_ids) or min(lengths, default=0) < 1 or shared < 0:
                raise ShapeError(
                    f"packed input_ids must be ({total},), the sum of {shared} shared and positive lengths; "
                    f"got {tuple(input_ids.shape)} and lengths {list(lengths)[:8]}"
                )
            longest, layout = shared + max(lengths), Layout.packed(lengths, input_ids.device, shared)
        elif input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ShapeError(f"input_ids must be (batch, seq), neither of them 0; got {tuple(input_ids.shape)}")
        elif cache is not None:
            layout = Layout.cached(cache, input_ids.shape[1], self.dtype)
            longest = int(layout.positions.max()) + 1
        else:
            batch, longest = input_ids.shape
            layout = Layout.rectangle(batch, longest, input_ids.device)
        self._check(input_ids, longest)
        return layout

    def _check(self, input_ids: Tensor, longest: int) -> None:
        context = min(self.config.max_position_embeddings, self.config.sliding_window or longest)
        if longest > context:
            kind = "sliding window, which is not supported beyond it" if self.config.sliding_window else "context"
            raise ShapeError(f"a sequence of {longest} tokens exceeds the model's {context}-token {kind}")
        # On other devices, the check would wait for the result. Within a vmap, no tensor has one.
        if input_ids.device.type == "cpu" and not is_transformed():
            low, high = input_ids.aminmax()
            if low < 0 or high >= self.config.vocab_size:
                bad = int(low if low < 0 else high)
                raise ShapeError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}")
