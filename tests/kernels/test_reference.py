"""The oracle against the definition written out once more: Python loops over numpy's fp32, exact fractions to round."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lorakit_kernels import Weight4bit, reference, unpack_4bit
from torch import Tensor

from lorakit.quantization import Codebook, codebook, dynamic_map

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256)

# Element by element: ordinary numbers, all zeros, the subnormals, the largest.
NUMBERS = st.one_of(
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0**-149, -(2.0**-149), 2.0**-128, 2.0**-24, 3e38, -65504.0]),
    st.floats(-(2.0**-120), 2.0**-120, width=32),
)


def ranks(x: list[np.float32], boundaries: list[np.float32], block_size: int) -> tuple[list[int], list[np.float32]]:
    """Number of boundaries below each scaled element, and the scale of each block."""
    result, scales = [], []
    for start in range(0, len(x), block_size):
        block = x[start : start + block_size]
        absmax = max(abs(value) for value in block)
        with np.errstate(divide="ignore", over="ignore"):
            reciprocal = np.float32(1) / absmax
            scaled = [value * reciprocal if value != 0 else np.float32(0) for value in block]
        result += [sum(bool(boundary < s) for boundary in boundaries) for s in scaled]
        scales.append(absmax)
    return result, scales


def rounded(value: np.float32, dtype: torch.dtype) -> int:
    """The bits of fp32 rounded to the nearest number of a 16-bit dtype, ties to even."""
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return int(np.float16(value).view(np.uint16))
    below = int(value.view(np.uint32)) >> 16  # towards zero
    nearest = [below, below + 1]
    exact = [Fraction(float(np.uint32(bits << 16).view(np.float32))) for bits in nearest if bits & 0x7FFF != 0x7F80]
    if len(exact) < 2:  # the upper neighbour would be 2^128
        exact.append(Fraction(2) ** 128 * (1 if value > 0 else -1))
    distances = [abs(Fraction(float(value)) - number) for number in exact]
    return min(nearest, key=lambda bits: (distances[bits - below], bits & 1))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@given(numbers=st.lists(NUMBERS, max_size=150), block_size=st.sampled_from(BLOCK_SIZES), dtype=st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=60)
def test_quantize_4bit(quant_type: str, numbers: list[float], block_size: int, dtype: torch.dtype) -> None:
    book, x = codebook(quant_type), finite(numbers, dtype)
    packed, absmax = reference.quantize_4bit(x, book.boundaries, book.order, block_size)
    expected, scales = ranks(list(x.float().numpy()), list(book.boundaries.numpy()), block_size)
    codes = [int(book.order[rank]) for rank in expected] + [book.zero] * (len(numbers) % 2)
    assert packed.tolist() == [codes[i] << 4 | codes[i + 1] for i in range(0, len(codes), 2)]
    assert absmax.tolist() == [float(scale) for scale in scales]


@given(numbers=st.lists(NUMBERS, max_size=40), block_size=st.sampled_from((16, 256)))
@settings(deadline=None, max_examples=40)
def test_quantize_8bit(numbers: list[float], block_size: int) -> None:
    table, x = dynamic_map(), finite(numbers, torch.float32)
    codes, absmax = reference.quantize_8bit(x, table.boundaries, block_size)
    expected, scales = ranks(list(x.numpy()), list(table.boundaries.numpy()), block_size)
    assert codes.tolist() == expected
    assert absmax.tolist() == [float(scale) for scale in scales]
    values = reference.dequantize_8bit(codes, table.values, absmax, block_size)
    assert values.tolist() == [
        float(table.values.numpy()[code] * scales[i // block_size]) for i, code in enumerate(expected)
    ]


@given(
    packed=st.binary(max_size=80), odd=st.booleans(), block_size=st.sampled_from(BLOCK_SIZES),
    dtype=st.sampled_from(DTYPES), exponent=st.integers(-149, 127), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(deadline=None, max_examples=100)
def test_dequantize_4bit(
    packed: bytes, odd: bool, block_size: int, dtype: torch.dtype, exponent: int, seed: int
) -> None:
    count = max(0, 2 * len(packed) - odd)
    random = np.random.default_rng(seed)
    absmax = np.ldexp(random.uniform(0.5, 1, -(-count // block_size)), exponent).astype(np.float32)
    values = codebook("nf4").values.numpy()
    out = torch.empty(count, dtype=dtype)
    stored = torch.tensor(list(packed), dtype=torch.uint8)
    weight = Weight4bit(stored, torch.from_numpy(values), torch.from_numpy(absmax), block_size, (count,))
    reference.dequantize_4bit_out(weight, out)
    codes = [code for byte in packed for code in (byte >> 4, byte & 15)][:count]
    exact = [values[code] * absmax[i // block_size] for i, code in enumerate(codes)]
    if dtype == torch.float32:
        assert out.tolist() == [float(value) for value in exact]
    else:
        assert out.view(torch.uint16).tolist() == [rounded(value, dtype) for value in exact]


@pytest.mark.parametrize("book", [codebook("nf4"), codebook("fp4"), dynamic_map()], ids=lambda book: book.name)
def test_a_boundary_takes_the_lower_value(book: Codebook) -> None:
    for low, boundary in enumerate(book.boundaries):
        x = torch.stack([boundary, torch.nextafter(boundary, torch.tensor(2.0)), torch.tensor(1.0)])
        codes, _ = reference.quantize_8bit(x, book.boundaries, 4)
        assert codes.tolist()[:2] == [low, low + 1]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_shows_in_its_scale_alone(value: float) -> None:
    book, x = codebook("nf4"), torch.ones(96)
    x[40] = value
    _, absmax = reference.quantize_4bit(x, book.boundaries, book.order, 32)
    assert absmax.isfinite().tolist() == [True, False, True]


def test_chunks_do_not_show() -> None:
    book, x = codebook("nf4"), torch.randn(3 << 18).bfloat16()  # more than one chunk either way
    packed, absmax = reference.quantize_4bit(x, book.boundaries, book.order, 64)
    out = torch.empty_like(x)
    reference.dequantize_4bit_out(Weight4bit(packed, book.values, absmax, 64, x.shape), out)
    for start in range(0, x.numel(), 1 << 16):
        part = slice(start, start + (1 << 16))
        some, scale = reference.quantize_4bit(x[part], book.boundaries, book.order, 64)
        assert torch.equal(some, packed[start // 2 : start // 2 + len(some)])
        assert torch.equal(scale, absmax[start // 64 : start // 64 + len(scale)])
        assert torch.equal(out[part], (book.values[unpack_4bit(some, 1 << 16).int()].view(-1, 64)
                                       * scale[:, None]).view(-1).bfloat16())  # fmt: skip


def finite(numbers: list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32).to(dtype).nan_to_num(posinf=1.0, neginf=-1.0)
