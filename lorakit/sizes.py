"""Sizes in bytes, parsed from and formatted as text."""

from __future__ import annotations

import re

from .errors import ConfigError

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{end}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for end, base in (("B", 1000), ("IB", 1024))
}


def parse_size(text: str) -> int:
    """Return the number of bytes that a text such as "5GB" (10^9 each), "512MiB" (2^20 each) or "1000000" states.

    Raises:
        ConfigError: the text is not a size, or not a positive one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    size = 0
    if match and match[2].upper() in _UNITS:
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise ConfigError(f"'{text}' is not a size; write it like 5GB, 500MB or 512MiB")
    return size


def format_size(size: float) -> str:
    """Return a size in GiB, or in MiB below 1 GiB: "3.21 GiB", "87 MiB"."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
