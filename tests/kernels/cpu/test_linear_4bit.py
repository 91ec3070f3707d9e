"""The CPU's products with a 4-bit weight, straight from the codes and band by band, against the exact product."""

from __future__ import annotations

import importlib
import shutil

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lorakit_kernels import cpu, reference
from lorakit_kernels.cpu import workspace
from tolerances import assert_within, matmul_rounding, rounding
from torch import Tensor

from lorakit import quantize
from lorakit.quantization import QuantizedWeight

linear = importlib.import_module("lorakit_kernels.cpu.linear_4bit")  # the package has a function of this name

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a step, relative
every_set = pytest.mark.parametrize("instruction_set", cpu.instruction_sets())
dtypes = st.sampled_from(list(ROUNDING))


@pytest.fixture(autouse=True)
def chosen_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute with the instruction set that the test is parametrized with."""
    if "instruction_set" in request.fixturenames:
        monkeypatch.setenv("LORAKIT_CPU_ISA", request.getfixturevalue("instruction_set"))


def values_of(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight's values by the definition, as float64."""
    out = torch.empty(weight.shape, dtype=dtype)
    reference.dequantize_4bit_out(weight.operand, out)
    return out.double()


def assert_one_sum(found: Tensor, left: Tensor, right: Tensor, rest: list[Tensor], rounding: float) -> None:
    """`found` is left @ right + the rest: summed in fp32 in any order, rounded once after each part."""
    terms = [left.double() @ right, *(part.double() for part in rest)]
    size = left.double().abs() @ right.abs()
    error = (found.double() - sum(terms)).abs()
    roundings = sum(term.abs() for term in terms) + sum(terms).abs()
    limit = left.shape[1] * 2.0**-23 * size + 1.01 * rounding * roundings + 1e-7 * rounding
    assert found.shape == error.shape
    assert (error <= limit).all(), f"error {error.max():.3g}, {(error / limit).max():.3g} times the limit"


@every_set
@given(
    tokens=st.integers(0, linear.FEW_TOKENS + 3),
    rows=st.integers(1, 13),
    blocks=st.integers(1, 40),
    block_size=st.sampled_from([32, 64, 128, 1024, 4096]),
    dtype=dtypes,
    double_quant=st.booleans(),
    extra=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
@example(tokens=1, rows=9, blocks=37, block_size=64, dtype=torch.bfloat16, double_quant=True, extra=0, seed=0)
@example(tokens=1, rows=4, blocks=300, block_size=64, dtype=torch.bfloat16, double_quant=True, extra=3, seed=0)
@settings(deadline=None, max_examples=80)
def test_forward(
    instruction_set: str, tokens: int, rows: int, blocks: int, block_size: int, dtype: torch.dtype, double_quant: bool,
    extra: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    columns = blocks * block_size if blocks * block_size <= 20_000 else block_size
    weight = quantize(torch.randn(rows, columns), block_size=block_size, double_quant=double_quant)
    x = torch.randn(tokens, columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if extra & 1 else None
    u, lora_b = torch.randn(tokens, 3).to(dtype), torch.randn(rows, 3).to(dtype)
    lora = (u, lora_b) if extra & 2 else ()
    y = cpu.linear_4bit(x, weight.operand, bias, lora, 0.5)
    assert y.dtype == dtype
    rest = ([] if bias is None else [bias.expand_as(y)]) + ([0.5 * u.double() @ lora_b.double().T] if lora else [])
    assert_one_sum(y, x, values_of(weight, dtype).T, rest, ROUNDING[dtype])


@every_set
@pytest.mark.parametrize("dtype", [*ROUNDING, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 66), (40, 96), (7, 130), (0, 64), (3, 0)])
@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2, 3), (50,)])
def test_any_shape(instruction_set: str, dtype: torch.dtype, shape: tuple[int, int], tokens: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = quantize(torch.randn(shape))
    dense = values_of(weight, dtype)
    x, dy = torch.randn(*tokens, shape[1]).to(dtype), torch.randn(*tokens, shape[0]).to(dtype)
    y, dx = cpu.linear_4bit(x, weight.operand), cpu.linear_4bit_dx(dy, weight.operand)
    added = torch.ones_like(dx)
    cpu.add_linear_4bit_dx(added, dy, weight.operand)
    accumulator = torch.promote_types(dtype, torch.float32)
    for found, base, a, b in ((y, 0, x, dense.T), (dx, 0, dy, dense), (added, 1, dy, dense)):
        product = a.double() @ b.double()
        stored = rounding(1, product.abs(), dtype) + rounding(1, (base + product).abs(), dtype)  # and the sum with dx
        assert_within(found, base + product, 1.01 * (matmul_rounding(a, b, accumulator) + stored))


@pytest.fixture
def narrow_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """A band that holds 64 rows or columns of the weights here, so that there are several."""
    monkeypatch.setattr(linear, "BAND_BYTES", 1)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(200, 130), (64, 64), (65, 320)])
def test_bands_make_no_difference(narrow_bands: None, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    tokens, (rows, columns) = 40, shape
    weight = quantize(torch.randn(shape))
    dense, rounding = values_of(weight, dtype), ROUNDING[dtype]
    assert len(list(linear.bands(rows, columns))) == -(-rows // 64)
    x, dy, bias = (
        torch.randn(tokens, columns).to(dtype),
        torch.randn(tokens, rows).to(dtype),
        torch.randn(rows).to(dtype),
    )
    assert_one_sum(cpu.linear_4bit(x, weight.operand, bias), x, dense.T, [bias.expand(tokens, rows)], rounding)
    t, lora_a = torch.randn(tokens, 3).to(dtype), torch.randn(3, columns).to(dtype)
    dx = cpu.linear_4bit_dx(dy, weight.operand, (t, lora_a))
    assert_one_sum(dx, dy, dense, [t.double() @ lora_a.double()], rounding)
    before = dx.clone()
    cpu.add_linear_4bit_dx(dx, dy, weight.operand)
    assert_one_sum(dx, dy, dense, [before], rounding)


def test_memory_does_not_grow_with_the_weight() -> None:
    weight = quantize(torch.randn(5000, 4096).bfloat16())
    x = torch.randn(40, 4096).bfloat16()
    cpu.linear_4bit(x, weight.operand)
    cpu.linear_4bit_dx(torch.randn(40, 5000).bfloat16(), weight.operand)
    assert workspace._buffer.memory.numel() <= linear.BAND_BYTES < 5000 * 4096 * 2


def test_infinite_and_missing_numbers_pass_through() -> None:
    weight = quantize(torch.randn(8, 128))
    x = torch.zeros(3, 128, dtype=torch.bfloat16)
    x[1, 5], x[2, 7] = float("inf"), float("nan")
    y = cpu.linear_4bit(x, weight.operand)
    assert (y[0] == 0).all() and not y[1].isfinite().any() and y[2].isnan().all()


def test_wrong_arguments_are_refused() -> None:
    weight = quantize(torch.randn(8, 128))
    with pytest.raises(ValueError, match=r"packed must have at least 512 elements"):
        cpu.linear_4bit(torch.randn(1, 128), weight.operand._replace(packed=weight.packed[:4]))
    with pytest.raises(ValueError, match=r"bias must have at least 8 elements of torch\.float32"):
        cpu.linear_4bit(torch.randn(1, 128), weight.operand, torch.randn(8).bfloat16())
