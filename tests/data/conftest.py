"""Tokenizers shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import made
import pytest
import tokenizers

from lorakit.models.tokenizer.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    """make_tokenizer(template, special, eos, build=byte_level, plain=()) -> a Tokenizer loaded from a new folder."""

    def make(
        template: str,
        special: Sequence[str],
        eos: Sequence[str],
        build: Callable[[], tokenizers.Tokenizer] = made.byte_level,
        plain: Sequence[str] = (),
    ) -> Tokenizer:
        folder = tmp_path_factory.mktemp("tokenizer")
        return made.make_tokenizer(folder, template, special, eos, build, plain)

    return make


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    """The tokenizer of a real checkpoint."""
    return load_tokenizer("smollm2-135m-instruct")
