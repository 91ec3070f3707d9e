"""Llama (Touvron et al. 2023, arXiv:2302.13971): the decoder as it is."""

from __future__ import annotations

from .family import Family, GGUFForm

LLAMA = Family("LlamaForCausalLM", "llama", gguf=GGUFForm("llama", permutes_qk=True, is_imported=True))
