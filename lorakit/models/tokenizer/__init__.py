"""Tokenizers and chat templates of checkpoint folders."""

from .tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
