"""Which kernel and which tile for which shape: a small table, by arithmetic, and the figures of a tuning run.

Fused or not: both ways read the codes. Dequantizing first moves 4.5 bytes a weight once, to write the values and read
them again: 1.3 ps a weight on an H100 (3.35 TB/s). The fused product spends 17 instructions a weight for every 128
tokens, 0.57 ps (29.6 instructions a ps), of which the tensor cores' 0.26 ps would be spent anyway. The two meet between
300 and 600 tokens; the limit is 256. This is arithmetic, not a measurement: `python -m lorakit_kernels.triton.tune`
measures.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ..cache import cache_folder

DECODE_TOKENS = 16  # up to here `decode` computes
FUSED_TOKENS = 256  # above, dequantize first
LANES = 64 if torch.version.hip else 32  # threads a warp: AMD's are twice as wide, and half as many do


class Tile(NamedTuple):
    """What one program computes, and how."""

    tokens: int  # of the result's tile
    features: int  # of the result's tile: out_features, or in_features for dx
    step: int  # of the dimension that is summed over
    warps: int  # of 32 threads
    stages: int  # steps whose loads are under way at once

    def options(self, lanes: int = LANES) -> dict[str, int | bool]:
        """What is given to Triton's compiler, for warps of so many threads.

        Fusing a * b + c would change the scales of double quantization.
        """
        return {"num_warps": self.warps * 32 // lanes, "num_stages": self.stages, "enable_fp_fusion": False}


# The first of each is the default, but for AMD where another is named.
CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "decode": (Tile(16, 16, 256, 4, 3), Tile(16, 32, 256, 4, 3), Tile(16, 32, 128, 4, 4), Tile(16, 64, 128, 4, 3)),
    "linear_4bit": (
        Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(128, 64, 64, 4, 4), Tile(128, 128, 32, 8, 2),
        Tile(32, 128, 64, 4, 3),
    ),
    "linear_4bit_dx": (
        Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(128, 64, 64, 4, 4), Tile(32, 64, 64, 4, 3),
    ),
}  # fmt: skip
AMD_DEFAULTS = {"linear_4bit": Tile(128, 128, 32, 8, 2)}  # steps of 64 spill registers on gfx942
EXACT = Tile(32, 32, 32, 4, 2)  # for fp32, whose products take no tensor cores and four times the registers


def choose(
    operation: str, tokens: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Tile | None:
    """Return the tile for an operation and shape; None says: dequantize, then multiply."""
    shape = key(operation, tokens, rows, columns)
    if dtype != torch.float32 and shape in tuned(device):
        return tuned(device)[shape]
    if tokens > FUSED_TOKENS:
        return None
    if dtype == torch.float32:
        return EXACT
    return default(family(operation, tokens))


def default(name: str, lanes: int = LANES) -> Tile:
    """Return the tile of a family where nothing is tuned."""
    return AMD_DEFAULTS.get(name, CANDIDATES[name][0]) if lanes == 64 else CANDIDATES[name][0]


def family(operation: str, tokens: int) -> str:
    """Return the name under which `CANDIDATES` has the tiles of an operation."""
    return "decode" if operation == "linear_4bit" and tokens <= DECODE_TOKENS else operation


def key(operation: str, tokens: int, rows: int, columns: int) -> str:
    """Return the name of a shape in the file of a tuning run: tokens count in powers of 2."""
    return f"{operation} {max(DECODE_TOKENS, 1 << (tokens - 1).bit_length())} {rows} {columns}"


def tuned_file(device: torch.device) -> Path:
    """Return where the tiles of a device are kept, in the cache folder."""
    name = torch.get_device_module(device).get_device_name(device).replace(" ", "-").replace("/", "-")
    return cache_folder() / "triton" / f"{name}.json"


@cache
def tuned(device: torch.device) -> dict[str, Tile | None]:
    """Return key -> tile, or None for dequantizing first, of a device's tuning run; empty where there was none."""
    if device.type == "cpu" or not tuned_file(device).exists():  # the CPU: in Triton's interpreter
        return {}
    stored = json.loads(tuned_file(device).read_text(encoding="utf-8"))["tiles"]
    return {shape: tile and Tile(*tile) for shape, tile in stored.items()}
