"""The Triton kernels in Triton's interpreter against the reference: codecs bit for bit, products within rounding.

Triton reads TRITON_INTERPRET when it is imported and kernels when they are defined, so these tests run in a process of
their own: the test below starts pytest once more with the variable set, on this very file.

The interpreter cuts fp32 off to bf16 instead of rounding, and multiplies bf16 as integers. So bf16 results of the codec
are compared with the reference cut off in the same way, and products are computed in fp16 and fp32.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from lorakit_kernels import reference
from torch import Tensor

from lorakit.quantization import Codebook, codebook, dynamic_map

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from lorakit_kernels import triton as kernels

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, started by the first test")
TABLE = dynamic_map()
SIZES = (1, 2, 31, 64, 777, 8192, 20_001)
BLOCK_SIZES = (32, 48, 64, 256, 4096)  # 48 is no power of 2
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
by_type = pytest.mark.parametrize("book", [codebook("nf4"), codebook("fp4")], ids=lambda book: book.name)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed, 1 skipped" in done.stdout


def weights(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random weights with zeros of both signs, ties and a block of zeros."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    boundaries = codebook("nf4").boundaries
    x[5::97] = boundaries.repeat(-(-count // 15))[: len(x[5::97])]
    x[::11], x[3::13] = 0.0, -0.0
    x[4096:8192] = 0.0
    x[64:96] = 1.0
    x[64 : 64 + len(boundaries)] = boundaries[: max(0, count - 64)]
    return x.to(dtype)


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether the bytes are equal, so that 0.0 is not -0.0; of nan only the places count."""
    if found.is_floating_point():
        if not torch.equal(found.isnan(), expected.isnan()):
            return False
        found, expected = found.masked_fill(found.isnan(), 0), expected.masked_fill(expected.isnan(), 0)
    return found.dtype == expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@interpreted
@by_type
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_quantize_4bit(block_size: int, dtype: torch.dtype, book: Codebook) -> None:
    for count in (0, *SIZES):
        x = weights(count, dtype)
        found = kernels.quantize_4bit(x, book.boundaries, book.order, block_size)
        expected = reference.quantize_4bit(x, book.boundaries, book.order, block_size)
        assert same(found[0], expected[0]) and same(found[1], expected[1]), count


@interpreted
def test_quantizing_what_is_tiny_or_not_finite() -> None:
    book, x = codebook("nf4"), weights(1000, torch.float32)
    x[:300] *= 2.0**-140  # its reciprocal overflows
    x[300:500] *= 2.0**-120
    x[600], x[700], x[701] = float("inf"), float("nan"), -float("inf")
    found, expected = (m.quantize_4bit(x, book.boundaries, book.order, 32) for m in (kernels, reference))
    assert same(found[0], expected[0]) and same(found[1], expected[1])
    found, expected = (m.quantize_8bit(x, TABLE.boundaries, 32) for m in (kernels, reference))
    assert same(found[0], expected[0]) and same(found[1], expected[1])


@interpreted
@pytest.mark.parametrize("block_size", (*BLOCK_SIZES, 6))
@pytest.mark.parametrize("book", [TABLE, codebook("nf4")], ids=lambda book: book.name)
def test_8bit(book: Codebook, block_size: int) -> None:
    for count in (0, *SIZES):
        x = weights(count, torch.float32)
        codes, absmax = kernels.quantize_8bit(x, book.boundaries, block_size)
        expected = reference.quantize_8bit(x, book.boundaries, block_size)
        assert same(codes, expected[0]) and same(absmax, expected[1]), count
        found = kernels.dequantize_8bit(codes, TABLE.values, absmax, block_size)
        assert same(found, reference.dequantize_8bit(codes, TABLE.values, absmax, block_size)), count


@interpreted
@by_type
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", (*BLOCK_SIZES, 6))
def test_dequantize_4bit(block_size: int, dtype: torch.dtype, nested: bool, book: Codebook) -> None:
    for count in (0, *SIZES):
        packed = torch.randint(256, ((count + 1) // 2,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        absmax, nesting = weights(-(-count // block_size), torch.float32).abs(), []
        if nested:
            absmax, scales = reference.quantize_8bit(absmax - 0.3, TABLE.boundaries, 16)
            nesting = [TABLE.values, scales, torch.tensor(0.3)]
        # One element more than is filled, which must stay.
        found = torch.full((count + 1,), 7, dtype=dtype)
        expected = torch.full((count + 1,), 7, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
        arguments = packed, book.values, absmax, block_size
        kernels.dequantize_4bit(*arguments, found[:count], nesting, 16)
        reference.dequantize_4bit(*arguments, expected[:count], nesting, 16)
        if dtype == torch.bfloat16 and not block_size % 8:
            expected = (expected.view(torch.int32) & -65536).view(torch.float32)  # as the interpreter cuts off
        assert same(found, expected.to(dtype)), count


@interpreted
def test_bytes_that_are_not_aligned() -> None:
    packed = torch.randint(256, (1001,), dtype=torch.uint8)
    found, expected = torch.empty(2, 2000)
    for module, out in ((kernels, found), (reference, expected)):
        module.dequantize_4bit(packed[1:], codebook("nf4").values, torch.arange(63.0), 32, out)
    assert same(found, expected)


@interpreted
def test_what_cannot_be_read_is_refused() -> None:
    book = codebook("nf4")
    with pytest.raises(ValueError, match=r"absmax must have at least 4 elements of torch\.float32 on cpu, got 3"):
        kernels.dequantize_4bit(torch.zeros(64, dtype=torch.uint8), book.values, torch.ones(3), 32, torch.empty(128))
    with pytest.raises(ValueError, match="packed must have at least 64 elements"):
        kernels.dequantize_4bit(torch.zeros(63, dtype=torch.uint8), book.values, torch.ones(4), 32, torch.empty(128))
    with pytest.raises(ValueError, match="at most 15 boundaries"):
        kernels.quantize_4bit(torch.ones(8), TABLE.boundaries, book.order, 32)
