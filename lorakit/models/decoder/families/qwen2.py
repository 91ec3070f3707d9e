"""Qwen2 (Yang et al. 2024, arXiv:2407.10671): queries, keys and values have a bias, whatever config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import Family, GGUFForm, sliding_window


def _switches(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True, "output_bias": False, "sliding_window": sliding_window(values, by_default=False)}


QWEN2 = Family("Qwen2ForCausalLM", "qwen2", _switches, gguf=GGUFForm("qwen2"))
