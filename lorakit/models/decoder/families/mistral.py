"""Mistral (Jiang et al. 2023, arXiv:2310.06825): a Llama whose attention may look back only over a window."""

from __future__ import annotations

from .family import Family, GGUFForm

MISTRAL = Family("MistralForCausalLM", "mistral", gguf=GGUFForm("llama", permutes_qk=True))
