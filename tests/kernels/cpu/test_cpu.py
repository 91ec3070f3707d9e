"""The C++ operations against the reference, bit for bit, with every instruction set that this processor has."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lorakit_kernels import Weight4bit, cpu, reference
from lorakit_kernels.cpu.loading import threads
from torch import Tensor

from lorakit.quantization import BLOCK_SIZES, codebook, dynamic_map

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SETS = cpu.instruction_sets()
every_set = pytest.mark.parametrize("instruction_set", SETS)

dtypes = st.sampled_from(list(INTEGERS))
quant_types = st.sampled_from(["nf4", "fp4"])
block_sizes = st.sampled_from([*BLOCK_SIZES, 2, 48])  # the last two: blocks that vectors do not divide
seeds = st.integers(0, 2**32)


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype | None = None) -> Tensor:
    """Tensors of any length and kind: any bits (inf, nan, subnormals among them), weights, ties, zeros, tiny ones."""
    dtype = dtype or draw(dtypes)
    count = draw(st.one_of(st.integers(0, 300), st.integers(0, 20_000)))
    random = torch.Generator().manual_seed(draw(seeds))
    x = torch.randn(count, generator=random)
    match draw(st.sampled_from(["bits", "finite", "weights", "tiny", "ties", "zeros"])):
        case "bits":
            return any_bits(count, dtype, random)
        case "finite":
            return any_bits(count, dtype, random).nan_to_num(0.0, 1.0, -1.0)
        case "tiny":  # where reciprocals overflow, and a little above
            x *= 2.0 ** draw(st.integers(-150, -120) if dtype != torch.float16 else st.integers(-26, -10))
        case "ties":
            boundaries = codebook(draw(quant_types)).boundaries
            x = boundaries[torch.randint(len(boundaries), (count,), generator=random)].clone()
            x[::29] = draw(st.sampled_from([1.0, -1.0, 2.0, 0.5]))
        case "zeros":  # whole blocks of them and between others, of both signs
            x[torch.rand(count, generator=random) < 0.5] = 0.0
            x[torch.rand(count, generator=random) < 0.3] = -0.0
            x[: count // 2] = -0.0
    return x.to(dtype)


def any_bits(count: int, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    top = 1 << (8 * dtype.itemsize - 1)
    return torch.randint(-top, top, (count,), generator=random).to(INTEGERS[dtype]).view(dtype)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal bytes: 0.0 is not -0.0. Of nan only the places must agree."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if found.is_floating_point():
        nan = expected.isnan()
        assert torch.equal(found.isnan(), nan)
        found, expected = found.masked_fill(nan, 0), expected.masked_fill(nan, 0)
    assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.fixture(autouse=True)
def chosen_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute with the instruction set that the test is parametrized with."""
    if "instruction_set" in request.fixturenames:
        monkeypatch.setenv("LORAKIT_CPU_ISA", request.getfixturevalue("instruction_set"))


@every_set
@given(x=tensors(), block_size=block_sizes, quant_type=quant_types)
@settings(deadline=None, max_examples=150)
def test_quantize_4bit(instruction_set: str, x: Tensor, block_size: int, quant_type: str) -> None:
    book = codebook(quant_type)
    found = cpu.quantize_4bit(x, book.boundaries, book.order, block_size)
    expected = reference.quantize_4bit(x, book.boundaries, book.order, block_size)
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])


@every_set
@given(x=tensors(), block_size=block_sizes)
@settings(deadline=None, max_examples=80)
def test_8bit(instruction_set: str, x: Tensor, block_size: int) -> None:
    table = dynamic_map()
    codes, absmax = cpu.quantize_8bit(x, table.boundaries, block_size)
    expected = reference.quantize_8bit(x, table.boundaries, block_size)
    assert_same(codes, expected[0])
    assert_same(absmax, expected[1])
    assert_same(
        cpu.dequantize_8bit(codes, table.values, absmax, block_size),
        reference.dequantize_8bit(codes, table.values, absmax, block_size),
    )


@every_set
@given(absmax=tensors(torch.float32), block_size=block_sizes, short=st.integers(0, 4096), quant_type=quant_types,
       dtype=dtypes, seed=seeds)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_dequantize_4bit(
    instruction_set: str, absmax: Tensor, block_size: int, short: int, quant_type: str, dtype: torch.dtype, seed: int
) -> None:
    absmax = absmax[: max(1, 20_000 // block_size)]
    count = max(0, len(absmax) * block_size - short % block_size)  # the last block has at least one element
    random = torch.Generator().manual_seed(seed)
    packed = torch.randint(256, ((count + 1) // 2,), generator=random, dtype=torch.uint8)
    found, expected = torch.full((2, count), 7, dtype=dtype).unbind()
    weight = Weight4bit(packed, codebook(quant_type).values, absmax, block_size, (count,))
    cpu.dequantize_4bit_out(weight, found)
    reference.dequantize_4bit_out(weight, expected)
    assert_same(found, expected)


@every_set
@given(scales=tensors(torch.float32), block_size=st.sampled_from([2, 48, 64, 4096]), nested=block_sizes,
       offset=st.floats(width=32), short=st.integers(0, 4096), dtype=dtypes, seed=seeds)  # fmt: skip
@settings(deadline=None, max_examples=100)
def test_dequantize_4bit_with_nested_scales(
    instruction_set: str, scales: Tensor, block_size: int, nested: int, offset: float, short: int, dtype: torch.dtype,
    seed: int,
) -> None:  # fmt: skip
    scales, table = scales[: max(1, 20_000 // block_size)], dynamic_map()
    codes, absmax = reference.quantize_8bit(scales, table.boundaries, nested)
    count = max(0, len(scales) * block_size - short % block_size)
    random = torch.Generator().manual_seed(seed)
    packed = torch.randint(256, ((count + 1) // 2,), generator=random, dtype=torch.uint8)
    found, expected = torch.full((2, count), 7, dtype=dtype).unbind()
    extra = [table.values, absmax, torch.tensor(offset)]
    weight = Weight4bit(packed, codebook("nf4").values, codes, block_size, (count,), extra, nested)
    cpu.dequantize_4bit_out(weight, found)
    reference.dequantize_4bit_out(weight, expected)
    assert_same(found, expected)


@every_set
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_float_is_read_exactly(instruction_set: str, dtype: torch.dtype) -> None:
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    _, absmax = cpu.quantize_8bit(x, dynamic_map().boundaries, 1)
    assert_same(absmax, x.float().abs())


@every_set
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_rounding(instruction_set: str, dtype: torch.dtype) -> None:
    """All 16-bit floats but nan, the midpoints above them, and the fp32 numbers next to those."""
    floats = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).float()
    floats = floats[floats.isfinite()].double()
    ascending = floats.unique()
    midpoints = ((ascending[1:] + ascending[:-1]) / 2).float()
    beyond = torch.tensor([65519.0, 65520.0, 65536.0, 3.4e38, float("inf")])
    values = torch.cat([floats.float(), midpoints, torch.nextafter(midpoints, torch.tensor(torch.inf)),
                        torch.nextafter(midpoints, torch.tensor(-torch.inf)), beyond, -beyond])  # fmt: skip
    codes = torch.arange(16, dtype=torch.uint8)
    packed, absmax = codes[0::2] << 4 | codes[1::2], torch.ones(1)
    for table in values[: len(values) // 16 * 16].view(-1, 16)[:: 5 if dtype == torch.bfloat16 else 1]:
        out = torch.empty(16, dtype=dtype)
        cpu.dequantize_4bit_out(Weight4bit(packed, table.contiguous(), absmax, 16, (16,)), out)
        assert_same(out, table.to(dtype))


@every_set
def test_threads_do_not_show(instruction_set: str) -> None:
    book, x = codebook("nf4"), torch.randn((1 << 21) + 77).bfloat16()
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            packed, absmax = cpu.quantize_4bit(x, book.boundaries, book.order, 64)
            out = torch.empty_like(x)
            cpu.dequantize_4bit_out(Weight4bit(packed, book.values, absmax, 64, x.shape), out)
            results.append((packed, absmax, out))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    expected = reference.quantize_4bit(x, book.boundaries, book.order, 64)
    assert torch.equal(results[0][0], expected[0])


def test_one_thread_starts_no_other() -> None:
    book, x = codebook("nf4"), torch.randn(1 << 21)
    with cpu.one_thread():
        assert threads() == (None, 1)
        found = cpu.quantize_4bit(x, book.boundaries, book.order, 64)
    assert threads()[1] == torch.get_num_threads()
    assert all(
        torch.equal(a, b) for a, b in zip(found, cpu.quantize_4bit(x, book.boundaries, book.order, 64), strict=True)
    )


def test_sources_that_are_not_contiguous_or_wider_than_fp32() -> None:
    book, x = codebook("nf4"), torch.randn(70, 90)
    for source in (x.t(), x[:, 1:], x[::2], x.double(), x.bfloat16().t()[5:]):
        found = cpu.quantize_4bit(source, book.boundaries, book.order, 32)
        expected = cpu.quantize_4bit(source.float().contiguous(), book.boundaries, book.order, 32)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    out = torch.empty(70, 90, dtype=torch.float64)
    packed, absmax = cpu.quantize_4bit(x, book.boundaries, book.order, 32)
    cpu.dequantize_4bit_out(Weight4bit(packed, book.values, absmax, 32, x.shape), out)
    assert torch.equal(out.float(), dequantized(packed, absmax, x.shape))


def dequantized(packed: Tensor, absmax: Tensor, shape: torch.Size) -> Tensor:
    out = torch.empty(shape)
    cpu.dequantize_4bit_out(Weight4bit(packed, codebook("nf4").values, absmax, 32, shape), out)
    return out


def test_nothing_is_read_or_written_behind_the_end_of_a_tensor() -> None:
    book = codebook("nf4")
    packed, absmax = cpu.quantize_4bit(torch.randn(100), book.boundaries, book.order, 32)
    good, out = Weight4bit(packed, book.values, absmax, 32, (100,)), torch.empty(100)
    bad = [
        {"packed": packed[:-1]},
        {"packed": packed.int()},
        {"codebook": book.values[:15]},
        {"codebook": book.values.double()},
        {"absmax": absmax[:-1]},
        {"absmax": absmax.bfloat16()},
        {"absmax": torch.empty(4, device="meta")},
        {"block_size": 0},
        {"block_size": 33},
    ]
    for change in bad:
        with pytest.raises(ValueError, match=next(iter(change))):
            cpu.dequantize_4bit_out(good._replace(**change), out)
    for wrong in (torch.empty(10, 20)[:, ::2], torch.empty(100, device="meta")):
        with pytest.raises(ValueError, match="out"):
            cpu.dequantize_4bit_out(good, wrong)
    table = dynamic_map().values
    nested = [table, torch.ones(1), torch.tensor(0.0)]
    good = good._replace(absmax=torch.zeros(4, dtype=torch.uint8), nested=nested, nested_block_size=256)
    cpu.dequantize_4bit_out(good, out)
    bad = [
        {"absmax": absmax},
        {"nested": [table[1:], torch.ones(1), torch.tensor(0.0)]},
        {"nested": [table, torch.ones(0), torch.tensor(0.0)]},
        {"nested": [table, torch.ones(1), torch.tensor(0.0, dtype=torch.float64)]},
    ]
    for change in bad:
        with pytest.raises(ValueError, match=next(iter(change))):
            cpu.dequantize_4bit_out(good._replace(**change), out)
    with pytest.raises(ValueError, match="block_size must be positive"):
        cpu.dequantize_4bit_out(good._replace(nested_block_size=0), out)
    with pytest.raises(ValueError, match="not enough values"):
        cpu.dequantize_4bit_out(good._replace(nested=[table]), out)
    with pytest.raises(ValueError, match="at most 15 boundaries"):
        cpu.quantize_4bit(torch.randn(8), torch.randn(16), torch.arange(17).byte(), 32)
    with pytest.raises(ValueError, match="order"):
        cpu.quantize_4bit(torch.randn(8), book.boundaries, book.order[:-1], 32)
    with pytest.raises(ValueError, match="codebook"):
        cpu.dequantize_8bit(torch.zeros(8, dtype=torch.uint8), torch.zeros(255), torch.ones(1), 32)
    with pytest.raises(ValueError, match="x must be on cpu, got meta"):
        cpu.quantize_8bit(torch.empty(8, device="meta"), dynamic_map().boundaries, 32)


def test_the_choice_of_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    x, boundaries = torch.randn(8), dynamic_map().boundaries
    monkeypatch.setenv("LORAKIT_CPU_ISA", "avx1024")
    with pytest.raises(ValueError, match="'avx1024', expected one of generic, avx2, avx512"):
        cpu.quantize_8bit(x, boundaries, 32)
    if "avx512" not in SETS:
        monkeypatch.setenv("LORAKIT_CPU_ISA", "avx512")
        with pytest.raises(ValueError, match="this processor has"):
            cpu.quantize_8bit(x, boundaries, 32)
