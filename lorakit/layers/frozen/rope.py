"""Rotary position embedding with the frequency scalings of published checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lorakit_kernels as kernels
import torch
from torch import Tensor

from ...errors import ConfigError, did_you_mean

ROPE_TYPES = ("default", "linear", "llama3")


def rope_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """Return the rotation per position of each pair of dimensions, (head_dim / 2,) fp32 radians.

    Args:
        head_dim: dimensions of a head, even.
        theta: base of the geometric series (Su et al. 2021, arXiv:2104.09864, section 3.3).
        scaling: `rope_scaling` of config.json: rope_type "default", "linear" or "llama3" and its parameters.

    Raises:
        ConfigError: the rope_type is another one, or one of its parameters is missing or not a number.
    """
    frequencies: Tensor = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if not scaling:
        return frequencies
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    try:
        if kind == "linear":
            return frequencies / float(scaling["factor"])
        if kind == "llama3":
            return _llama3(frequencies, scaling)
    except KeyError as missing:
        raise ConfigError(f"rope_scaling of type '{kind}' in config.json lacks {missing}") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"rope_scaling of type '{kind}' in config.json: {error}") from None
    if kind != "default":
        known = ", ".join(ROPE_TYPES)
        raise ConfigError(
            f"rope_scaling of type '{kind}' is not supported{did_you_mean(kind, ROPE_TYPES)} (known: {known})"
        )
    return frequencies


def _llama3(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Stretch the slow rotations by `factor`, keep the fast ones, blend between (Llama 3.1's context extension)."""
    context = scaling["original_max_position_embeddings"]
    slow, fast, factor = (float(scaling[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    turns = float(context) * frequencies / (2 * math.pi)  # full rotations within the original context
    keep = ((turns - slow) / (fast - slow)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / factor


def rope_tables(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * frequency, each (tokens, head_dim) in Hugging Face's half-split layout.

    Args:
        frequencies: (head_dim / 2,) fp32, from `rope_frequencies`.
        positions: (tokens,).
        dtype: dtype of the tables.
    """
    angles = positions[:, None].float() * frequencies.to(positions.device)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q (tokens, heads, head_dim) and k (tokens, kv_heads, head_dim) by tables (tokens, head_dim)."""
    return kernels.rope(q, k, cos, sin, False)
