"""The tokenizer of the tests of probes."""

from __future__ import annotations

import pytest
from made import small_tokenizer

from lorakit import Tokenizer


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))
