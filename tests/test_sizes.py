"""Sizes as people write and read them."""

from __future__ import annotations

import pytest

from lorakit.errors import ConfigError
from lorakit.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("7", 7), ("20kb", 20_000), ("2TiB", 2 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1GB", "0", "1e3", "5 G B", "five"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size; write it like 5GB"):
        parse_size(text)


@pytest.mark.parametrize(("size", "text"), [(2**30, "1.00 GiB"), (5 * 2**28, "1.25 GiB"), (87.4 * 2**20, "87 MiB")])
def test_what_is_shown(size: float, text: str) -> None:
    assert format_size(size) == text
