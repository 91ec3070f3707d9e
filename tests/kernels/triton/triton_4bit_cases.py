"""The Triton kernels of 4-bit weights in Triton's interpreter: codecs bit for bit, products within rounding.

Run as: TRITON_INTERPRET=1 pytest tests/kernels/triton/triton_4bit_cases.py (as test_triton.py does).

The interpreter cuts fp32 off to bf16 instead of rounding, and multiplies bf16 as integers. So bf16 results of the codec
are compared with the reference cut off in the same way, and products are computed in fp16 and fp32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lorakit_kernels import Weight4bit, reference
from lorakit_kernels import triton as kernels
from lorakit_kernels.triton import tiles, tune
from tolerances import assert_alike, assert_within, matmul_rounding, unit
from torch import Tensor

from lorakit.quantization import Codebook, codebook, dynamic_map

TABLE = dynamic_map()
SIZES = (1, 31, 64, 777, 12_289)
BLOCK_SIZES = (32, 48, 64, 256, 4096)  # 48 is no power of 2
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
by_type = pytest.mark.parametrize("book", [codebook("nf4"), codebook("fp4")], ids=lambda book: book.name)


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


@by_type
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_quantize_4bit(block_size: int, dtype: torch.dtype, book: Codebook) -> None:
    for count in (0, *SIZES):
        x = weights(count, dtype)
        found = kernels.quantize_4bit(x, book.boundaries, book.order, block_size)
        expected = reference.quantize_4bit(x, book.boundaries, book.order, block_size)
        assert same(found[0], expected[0]) and same(found[1], expected[1]), count


def test_quantizing_what_is_tiny_or_not_finite() -> None:
    book, x = codebook("nf4"), weights(1000, torch.float32)
    x[:300] *= 2.0**-140  # its reciprocal overflows
    x[300:500] *= 2.0**-120
    x[600], x[700], x[701] = float("inf"), float("nan"), -float("inf")
    found, expected = (m.quantize_4bit(x, book.boundaries, book.order, 32) for m in (kernels, reference))
    assert same(found[0], expected[0]) and same(found[1], expected[1])
    found, expected = (m.quantize_8bit(x, TABLE.boundaries, 32) for m in (kernels, reference))
    assert same(found[0], expected[0]) and same(found[1], expected[1])


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


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", (*BLOCK_SIZES, 6))
def test_dequantize_4bit(block_size: int, dtype: torch.dtype, nested: bool) -> None:
    book = codebook("fp4")
    for count in (0, *SIZES):
        packed = torch.randint(256, ((count + 1) // 2,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        absmax, nesting = weights(-(-count // block_size), torch.float32).abs(), []
        if nested:
            absmax, scales = reference.quantize_8bit(absmax - 0.3, TABLE.boundaries, 16)
            nesting = [TABLE.values, scales, torch.tensor(0.3)]
        # One element more than is filled, which must stay.
        found = torch.full((count + 1,), 7, dtype=dtype)
        expected = torch.full((count + 1,), 7, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
        weight = Weight4bit(packed, book.values, absmax, block_size, (count,), nesting, 16)
        kernels.dequantize_4bit_out(weight, found[:count])
        reference.dequantize_4bit_out(weight, expected[:count])
        if dtype == torch.bfloat16 and not block_size % 8:
            expected = (expected.view(torch.int32) & -65536).view(torch.float32)  # as the interpreter cuts off
        assert same(found, expected.to(dtype)), count


def test_bytes_that_are_not_aligned() -> None:
    packed = torch.randint(256, (1001,), dtype=torch.uint8)
    found, expected = torch.empty(2, 2000)
    for module, out in ((kernels, found), (reference, expected)):
        module.dequantize_4bit_out(Weight4bit(packed[1:], codebook("nf4").values, torch.arange(63.0), 32, (2000,)), out)
    assert same(found, expected)


def exact(*products: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A sum of products in fp64, and how far rounding may take a result from it: of fp32 sums, then of the result.

    Dequantizing first, each product may be rounded before the next is added. Besides its sum, a summand goes through
    the scale, the scaling and two more sums.
    """
    result = error = torch.zeros(())
    for left, right in products:
        product = left.double() @ right.double()
        result = result + product
        error = error + matmul_rounding(left, right, more=4) + 2 * unit(left.dtype) * product.abs()
    return result, error


# Rows of several blocks, of half a block, of no whole number of blocks, and odd ones, which are dequantized first.
WEIGHTS = [(48, 128, 64), (33, 32, 64), (70, 200, 64), (17, 264, 48), (7, 50, 32), (3, 4104, 4096)]
TOKENS = [(), (1,), (16,), (2, 17), (129,), (300,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_products(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, columns, block_size = shape
    random = torch.Generator().manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randn(*size, generator=random).to(dtype)

    book = codebook("nf4")
    packed, absmax = reference.quantize_4bit(numbers(rows, columns) / 8, book.boundaries, book.order, block_size)
    nesting: list[Tensor] = []
    for tokens, rank in zip(TOKENS, (0, 1, 16, 70, 4, 8), strict=True):
        if rank == 70:  # and from here on
            absmax, scales = reference.quantize_8bit(absmax - 0.1, TABLE.boundaries, 256)
            nesting = [TABLE.values, scales, torch.tensor(0.1)]
        weight = Weight4bit(packed, book.values, absmax, block_size, (rows, columns), nesting, 256)
        values = torch.empty(rows, columns, dtype=dtype)
        reference.dequantize_4bit_out(weight, values)

        x, bias = numbers(*tokens, columns), numbers(rows) if rank != 16 else None
        lora = (numbers(*tokens, rank), numbers(rows, rank)) if rank else ()
        products = [(x, values.T)]
        if lora:
            products.append((lora[0] / 2, lora[1].T))
        if bias is not None:
            products.append((torch.ones(*tokens, 1, dtype=dtype), bias[None, :]))
        expected, error = exact(*products)
        found = kernels.linear_4bit(x, weight, bias, lora, 0.5)
        assert found.dtype == dtype and found.shape == expected.shape
        assert_within(found, expected, error)

        dy = numbers(*tokens, rows)
        lora = (lora[0], numbers(rank, columns)) if rank else ()
        expected, error = exact((dy, values), *([lora] if lora else []))
        found = kernels.linear_4bit_dx(dy, weight, lora)
        assert found.dtype == dtype and found.shape == expected.shape
        assert_within(found, expected, error)


def test_tuning_keeps_the_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "tuned_file", lambda device: tmp_path / "triton" / "gpu.json")
    table = tiles.tuned(torch.device("cpu"))
    fastest = {
        "linear_4bit 16 64 64": tiles.CANDIDATES["decode"][2],
        "linear_4bit_dx 16 64 64": None,  # dequantize first
        "linear_4bit 32 64 64": tiles.CANDIDATES["linear_4bit"][1],
        "linear_4bit_dx 32 64 64": tiles.CANDIDATES["linear_4bit_dx"][3],
    }
    tried = []

    def measure(run: Callable[[], Tensor]) -> float:
        shape, tile = list(table.items())[-1]
        tried.append((shape, run()))
        return 1.0 if tile == fastest[shape] else 2.0

    file = tune.tune([(64, 64)], [1, 32], torch.device("cpu"), measure, torch.float16)
    chosen = [tiles.choose("linear_4bit", tokens, 64, 64, torch.float16, torch.device("cpu")) for tokens in (1, 20)]
    table.clear()
    stored = {shape: tile and tiles.Tile(*tile) for shape, tile in json.loads(file.read_text())["tiles"].items()}
    assert stored == fastest
    assert chosen == [fastest["linear_4bit 16 64 64"], fastest["linear_4bit 32 64 64"]]
    for shape in fastest:  # whichever way it is computed
        results = [result for name, result in tried if name == shape]
        assert len(results) == 1 + len(tiles.CANDIDATES[tiles.family(shape.split()[0], int(shape.split()[1]))])
        for result in results:  # 64 products, of weights that dequantizing first rounds to fp16
            assert_alike(result, results[-1], terms=64 + 2, stores=2)


def test_what_cannot_be_read_is_refused() -> None:
    book = codebook("nf4")
    weight = Weight4bit(torch.zeros(64, dtype=torch.uint8), book.values, torch.ones(4), 32, (128,))
    with pytest.raises(ValueError, match=r"absmax must have at least 4 elements of torch\.float32 on cpu, got 3"):
        kernels.dequantize_4bit_out(weight._replace(absmax=torch.ones(3)), torch.empty(128))
    with pytest.raises(ValueError, match="packed must have at least 64 elements"):
        kernels.dequantize_4bit_out(weight._replace(packed=weight.packed[:63]), torch.empty(128))
    with pytest.raises(ValueError, match="at most 15 boundaries"):
        kernels.quantize_4bit(torch.ones(8), TABLE.boundaries, book.order, 32)
