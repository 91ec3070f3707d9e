"""The kernel and the tile for each shape: a small table derived by arithmetic, and the results of a tuning run.

Both ways, fused or not, read the codes. Dequantizing first moves 4.5 bytes per weight once, to write the values and
read them again: 1.3 ps per weight on an H100 (3.35 TB/s). The fused product spends 17 instructions per weight for every
128 tokens, 0.57 ps (29.6 instructions per ps); the tensor cores' 0.26 ps of it would be spent anyway. The two meet
between 300 and 600 tokens; the limit is 256. These figures are arithmetic, not measurements:
`python -m lorakit_kernels.triton.tune` measures.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ..cache import cache_folder

DECODE_TOKENS = 16  # most tokens that `decode` takes
FUSED_TOKENS = 256  # with more tokens, dequantize first
LANES = 64 if torch.version.hip else 32  # threads per warp; AMD's warps are twice as wide, so half as many suffice


class Tile(NamedTuple):
    """The tile of the result that one program computes, and how it computes it.

    Attributes:
        tokens: tokens in the tile.
        features: features in the tile: out_features, or in_features for dx.
        step: elements per step of the dimension that is summed over.
        warps: warps of 32 threads.
        stages: steps whose loads are in flight at once.
    """

    tokens: int
    features: int
    step: int
    warps: int
    stages: int

    def options(self, lanes: int = LANES) -> dict[str, int | bool]:
        """Return the options for Triton's compiler, for warps of `lanes` threads.

        Fusing a * b + c would change the scales of double quantization, so it is off.
        """
        return {"num_warps": self.warps * 32 // lanes, "num_stages": self.stages, "enable_fp_fusion": False}


# The first of each family is the default, except on AMD where AMD_DEFAULTS names another.
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
EXACT = Tile(32, 32, 32, 4, 2)  # for fp32: its products use no tensor cores and take four times the registers


def choose(
    operation: str, tokens: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Tile | None:
    """Return the tile for an operation and shape, or None to dequantize first and then multiply."""
    shape = key(operation, tokens, rows, columns)
    if dtype != torch.float32 and shape in tuned(device):
        return tuned(device)[shape]
    if tokens > FUSED_TOKENS:
        return None
    if dtype == torch.float32:
        return EXACT
    return default(family(operation, tokens))


def default(name: str, lanes: int = LANES) -> Tile:
    """Return the tile of a family for shapes that are not tuned."""
    return AMD_DEFAULTS.get(name, CANDIDATES[name][0]) if lanes == 64 else CANDIDATES[name][0]


def family(operation: str, tokens: int) -> str:
    """Return the key of `CANDIDATES` for an operation and a number of tokens."""
    return "decode" if operation == "linear_4bit" and tokens <= DECODE_TOKENS else operation


def key(operation: str, tokens: int, rows: int, columns: int) -> str:
    """Return the name of a shape in the file of a tuning run. Tokens are rounded up to a power of 2, at least 16."""
    return f"{operation} {max(DECODE_TOKENS, 1 << (tokens - 1).bit_length())} {rows} {columns}"


def tuned_file(device: torch.device) -> Path:
    """Return the file in the cache folder that holds the tuned tiles of a device."""
    name = torch.get_device_module(device).get_device_name(device).replace(" ", "-").replace("/", "-")
    return cache_folder() / "triton" / f"{name}.json"


@cache
def tuned(device: torch.device) -> dict[str, Tile | None]:
    """Return a device's tuning run, key -> tile, or None to dequantize first; empty if there was no run."""
    if device.type == "cpu" or not tuned_file(device).exists():  # the CPU runs Triton's interpreter
        return {}
    stored = json.loads(tuned_file(device).read_text(encoding="utf-8"))["tiles"]
    return {shape: tile and Tile(*tile) for shape, tile in stored.items()}
