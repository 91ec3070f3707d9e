"""Qwen3 (Yang et al. 2025, arXiv:2505.09388): each head's query and key are normalized before they are rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import Family, GGUFForm, sliding_window


def _switches(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"qk_norm": True, "sliding_window": sliding_window(values, by_default=False)}


QWEN3 = Family("Qwen3ForCausalLM", "qwen3", _switches, gguf=GGUFForm("qwen3"))
