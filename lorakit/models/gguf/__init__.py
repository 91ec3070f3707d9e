"""GGUF files: reading them, and turning one into a checkpoint folder with its tokenizer."""

from .gguf_import import import_gguf

__all__ = ["import_gguf"]
