"""The codec against bitsandbytes over a grid of types, block sizes, dtypes and shapes, where bitsandbytes is right.

That is: rows of whole blocks, no block of zeros alone (test_defects.py has the others). NF4 must agree bit for bit. FP4
has two codes for zero, 0 and 8: bitsandbytes' CPU code takes 8 for small positive numbers where this library takes 0.
"""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from torch import Tensor

from lorakit import quantize
from lorakit.quantization import BLOCK_SIZES, NestedScales, dynamic_map

bnb = importlib.import_module("bitsandbytes.functional")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {  # of a block size b
    "one block": lambda b: (1, b),
    "rows": lambda b: (7, b),
    "33 rows": lambda b: (33, b),
    "two blocks a row": lambda b: (16, 2 * b),
    "three blocks a row": lambda b: (5, 3 * b),
    "vector": lambda b: (6 * b,),
    "experts": lambda b: (2, 3, b),
}
GRID = list(itertools.product(("nf4", "fp4"), BLOCK_SIZES, DTYPES, SHAPES))


def test_the_grid_is_large() -> None:
    assert len(GRID) >= 300


@pytest.mark.parametrize(("quant_type", "block_size", "dtype", "shape"), GRID, ids=str)
def test_codes_scales_and_values(quant_type: str, block_size: int, dtype: torch.dtype, shape: str) -> None:
    weight = grid_weight(SHAPES[shape](block_size), dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type=quant_type, blocksize=block_size)
    theirs = bnb.dequantize_4bit(packed, state).view(weight.shape)  # a vector comes back as (1, n)
    ours = quantize(weight, quant_type, block_size, double_quant=False)
    assert same_bits(ours.absmax, state.absmax)
    assert torch.equal(ours.code_values, state.code)
    if quant_type == "nf4":
        assert torch.equal(ours.packed.view(-1), packed.view(-1))
        assert same_bits(ours.dequantize(), theirs)
    else:
        assert torch.equal(one_zero(ours.packed), one_zero(packed))
        assert torch.equal(ours.dequantize(), theirs)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_their_nested_bytes_give_their_values(block_size: int, dtype: torch.dtype) -> None:
    weight = grid_weight((33, 2 * block_size), dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=block_size, compress_statistics=True)
    ours = quantize(weight, "nf4", block_size, double_quant=False)
    nested = state.state2
    scales = NestedScales(state.absmax, nested.absmax, state.offset, nested.code, nested.blocksize)
    read = type(ours)(packed, scales, weight.shape, dtype, "nf4", block_size, state.code)
    assert same_bits(read.dequantize(), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("seed", range(8))
def test_nested_codes_are_the_nearest_where_theirs_are_not_always(seed: int) -> None:
    """Of the same numbers: ours are never farther than theirs, and theirs are the nearest nearly always."""
    absmax = torch.rand(20_000, generator=torch.Generator().manual_seed(seed)) ** 3
    ours, table = NestedScales.quantize(absmax), dynamic_map().values
    theirs, state = bnb.quantize_blockwise(absmax - ours.offset, blocksize=256)
    assert torch.equal(state.absmax, ours.absmax)
    scaled = (absmax - ours.offset) * ours.absmax.reciprocal().repeat_interleave(256)[: len(absmax)]
    distance = (scaled.double()[:, None] - table.double()).abs()
    our_distance, their_distance = (
        distance.gather(1, codes.long()[:, None]).squeeze(1) for codes in (ours.codes, theirs.view(-1))
    )
    assert (our_distance <= distance.amin(1) + 1e-7).all()  # a midpoint rounded to fp32 may go either way
    assert (our_distance <= their_distance + 1e-7).all()
    assert 0.99 < (ours.codes == theirs.view(-1)).float().mean() < 1


def grid_weight(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers whose scale differs from block to block, with zeros and ties among them."""
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator)
    flat = weight.view(-1)
    flat[3::17] = 0.0
    flat[7::32] = 1.0  # so that no block is all zeros
    flat[11::64] = -3.5  # the largest of most blocks: a round number, of which others are halves and quarters
    flat[13::64] = 1.75
    return (weight * torch.logspace(-2, 1, weight.numel()).view(shape)).to(dtype)


def one_zero(packed: Tensor) -> Tensor:
    """Return FP4 codes, one a byte, with both codes of zero as 0."""
    flat = packed.view(-1)
    codes = torch.stack([flat >> 4, flat & 15], dim=1).view(-1)
    return codes.masked_fill(codes == 8, 0)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of bytes, stricter than of values: 0.0 is not -0.0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
