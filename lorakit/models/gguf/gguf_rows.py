"""The order of q and k rows in GGUF files of the llama architecture, in both directions.

Rotary embeddings turn pairs of a head's components. Hugging Face pairs halves, (i, i + head_dim/2); GGUF's llama pairs
neighbors, (2i, 2i + 1). So row i + s * head_dim/2 of a head in Hugging Face's order is its row 2i + s in GGUF's.
"""

from __future__ import annotations

from torch import Tensor


def to_gguf_rows(weight: Tensor, heads: int) -> Tensor:
    """Put the rows of a q or k projection, or of its lora_B, from Hugging Face's order into GGUF's.

    Args:
        weight: (heads * head_dim, columns), of any dtype; head_dim is even.
        heads: query heads for q, key-value heads for k.

    Returns:
        (heads * head_dim, columns); `from_gguf_rows` is the inverse.
    """
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)  # (head, s, i, column)
    return halves.transpose(1, 2).reshape(rows, columns)


def from_gguf_rows(weight: Tensor, heads: int) -> Tensor:
    """Put the rows of a q or k projection from GGUF's order back into Hugging Face's.

    Args:
        weight: (heads * head_dim, columns), of any dtype; head_dim is even.
        heads: query heads for q, key-value heads for k.

    Returns:
        (heads * head_dim, columns); `to_gguf_rows` is the inverse.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)  # (head, i, s, column)
    return pairs.transpose(1, 2).reshape(rows, columns)
