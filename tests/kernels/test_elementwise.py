"""RMSNorm, rotary embedding, SwiGLU and the loss in C++ against their definitions, with every instruction set there is.

Bit for bit wherever the definition rounds the same numbers. Two things differ, each with its bound here: a sum, which
C++ takes in fp64, and the exponential, which is right to one unit of fp32.
"""

from __future__ import annotations

import shutil
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lorakit_kernels import cpu, dispatch
from lorakit_kernels import reference as definition
from lorakit_kernels.ops.dropout import philox
from tolerances import assert_alike, assert_within, rounding
from torch import Tensor

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of the value
OPERATIONS = ("rms_norm", "rms_norm_backward", "rope", "swiglu", "swiglu_backward", "drop", "cross_entropy")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SIZES = (1, 2, 3, 15, 16, 17, 64, 100, 577, 2049)


@pytest.fixture(params=cpu.instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LORAKIT_CPU_ISA", request.param)
    return str(request.param)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal bytes: 0.0 is not -0.0. Of nan only the places must agree."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    found, expected = (x.masked_fill(nan, 0).contiguous().view(torch.uint8) for x in (found, expected))
    assert torch.equal(found, expected)


def assert_near(found: Tensor, expected: Tensor, terms: int, more: Tensor | float = 0.0) -> None:
    """Equal where nan or infinite; else within roundings in fp32 and two units of a row's largest number."""
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    found, expected = found.masked_fill(nan, 0), expected.masked_fill(nan, 0)
    largest = expected.double().abs().nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True)
    bound = rounding(terms, largest) + 4 * HALF_UNIT[expected.dtype] * largest + more
    assert_within(found, expected, bound.expand(expected.shape).masked_fill(expected.isinf(), 0))


def any_bits(*shape: int, dtype: torch.dtype) -> Tensor:
    """Inf, nan and subnormal numbers among them."""
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    top = 1 << (8 * dtype.itemsize - 1)
    return torch.randint(-top, top, shape).to(integers).view(dtype)


def every_16_bit(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)


# ---- RMSNorm -------------------------------------------------------------------------------------------------------


def whole_numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-8, 9, shape).to(dtype)


@every_dtype
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm_where_sums_are_exact_is_the_definition(
    size: int, weight_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    torch.manual_seed(size)
    x, weight = whole_numbers(3, 2, size, dtype=dtype), whole_numbers(size, dtype=weight_dtype)
    (y, rstd), (expected, expected_rstd) = cpu.rms_norm(x, weight, 1e-5), definition.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(rstd, expected_rstd, rtol=2.0**-23, atol=0)  # PyTorch's roots are not always nearest
    assert_same(y, weight * (x.float() * rstd).to(dtype))
    dy, power = whole_numbers(3, 2, size, dtype=expected.dtype), torch.tensor([[0.5], [0.125]]).expand(3, 2, 1)
    assert_same(cpu.rms_norm_backward(dy, x, weight, power), definition.rms_norm_backward(dy, x, weight, power))


@every_dtype
@given(size=st.integers(1, 700), rows=st.integers(1, 5), exponent=st.integers(-20, 12), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_rms_norm_of_any_numbers(dtype: torch.dtype, size: int, rows: int, exponent: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = (torch.randn(rows, size) * 2.0**exponent).to(dtype), torch.randn(size).to(dtype)
    y, rstd = cpu.rms_norm(x, weight, 1e-6)
    exact = 1 / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(rstd.double(), exact, rtol=2.5 * 2.0**-24 + 2.0**-23, atol=0)
    assert_same(y, weight * (x.float() * rstd).to(dtype))
    dy = torch.randn(rows, size).to(dtype)
    g, normed, wide = (dy * weight).double(), (x.float() * rstd).double(), rstd.double()
    exact = (g - normed * (g * normed).mean(-1, keepdim=True)) * wide
    magnitude = (g.abs() + normed.abs() * (g * normed).abs().mean(-1, keepdim=True)) * wide
    error = (cpu.rms_norm_backward(dy, x, weight, rstd).double() - exact).abs()
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # of the subnormal numbers
    assert (error <= HALF_UNIT[dtype] * exact.abs() + 2.0**-22 * magnitude + smallest).all()


@every_dtype
def test_rms_norm_of_numbers_that_are_not_finite_or_overflow(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.randn(7, 40).to(dtype)
    x[0, 3], x[1, 3], x[2, 3], x[3, 3], x[4] = torch.inf, -torch.inf, torch.nan, largest, largest
    x[5], x[6] = 0, torch.finfo(dtype).tiny
    weight, dy = torch.randn(40).to(dtype), torch.randn(7, 40).to(dtype)
    found, expected = cpu.rms_norm(x, weight, 1e-5), definition.rms_norm(x, weight, 1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs, 40 // 2 + 6)
    dy[1, 5], dy[6, 2] = torch.nan, torch.inf
    ours, theirs = (module.rms_norm_backward(dy, x, weight, expected[1]) for module in (cpu, definition))
    assert_near(ours, theirs, 40 + 8)


# ---- rotary embedding ----------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("backward", [False, True])
@given(
    tokens=st.integers(1, 5), heads=st.integers(1, 4), kv_heads=st.integers(1, 2), dim=st.integers(1, 140),
    bits=st.booleans(), seed=st.integers(0, 2**32),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_rope_is_the_definition(
    backward: bool, dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, dim: int, bits: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    shapes = (tokens, heads, dim), (tokens, kv_heads, dim), (tokens, dim), (tokens, dim)
    given = [any_bits(*shape, dtype=dtype) if bits else torch.randn(shape).to(dtype) for shape in shapes]
    for found, expected in zip(cpu.rope(*given, backward), definition.rope(*given, backward), strict=True):
        assert_same(found, expected)


def test_rope_of_views() -> None:
    joint, cos, sin = torch.randn(6, 5, 3, 32), torch.randn(32, 6).t(), torch.randn(6, 64)[:, ::2]
    q, k = joint.transpose(0, 1)[1], joint[:, :2, 0]  # rows that lie apart
    turned = torch.randn(4, 6, 32).transpose(0, 1), torch.randn(32, 6, 2).permute(1, 2, 0)  # as gradients come
    for first, second in ((q[:3], k[:3]), turned):
        count = len(first)
        found = cpu.rope(first, second, cos[:count], sin[:count])
        for ours, theirs in zip(found, definition.rope(first, second, cos[:count], sin[:count]), strict=True):
            assert_same(ours, theirs)
            assert ours.is_contiguous()


# ---- SwiGLU --------------------------------------------------------------------------------------------------------


def is_rounded(found: Tensor, exact: Tensor, relative: float) -> Tensor:
    """Where `found` is what a number that is at most this far from `exact` is rounded to."""
    low, high = ((exact * (1 + sign * relative)).to(found.dtype) for sign in (-1, 1))
    return (found == low) | (found == high) | (found == exact.to(found.dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_swiglu_of_every_16_bit_gate(dtype: torch.dtype) -> None:
    gate = every_16_bit(dtype)
    one = torch.ones_like(gate)
    silu, wide = cpu.swiglu(gate, one), gate.double()
    normal = wide.abs() <= 87
    assert is_rounded(silu, wide * wide.sigmoid(), 2.0**-22)[normal].all()
    expected = definition.swiglu(gate, one)  # inf, nan, and where e^-gate overflows
    assert_same(silu[~normal], expected[~normal])
    up, dy = any_bits(2, len(gate), dtype=dtype)
    assert_same(cpu.swiglu(gate, up), silu * up)
    dgate, dup = cpu.swiglu_backward(dy, gate, up)
    assert_same(dup, silu * dy)
    assert torch.equal(dgate.isnan(), definition.swiglu_backward(dy, gate, up)[0].isnan())


@given(scale=st.sampled_from([1e-30, 1e-3, 1.0, 10.0, 60.0]), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_swiglu_in_fp32_is_right_to_two_units(scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    gate = (torch.randn(10_000) * scale).clamp(-87, 1e4)
    exact = gate.double() * gate.double().sigmoid()
    silu = cpu.swiglu(gate, torch.ones_like(gate))
    torch.testing.assert_close(silu.double(), exact, rtol=2.0**-22, atol=1e-44)
    up = torch.randn_like(gate)
    assert_same(cpu.swiglu(gate, up), silu * up)


@every_dtype
@given(count=st.integers(1, 3000), scale=st.sampled_from([0.01, 1.0, 6.0, 40.0]), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_swiglu_backward(dtype: torch.dtype, count: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    dy, gate, up = (torch.randn(3, count) * scale).to(dtype)
    gate = gate.clamp(min=-87)  # below e^-gate overflows, and the gradient is 0
    dgate, dup = cpu.swiglu_backward(dy, gate, up)
    assert_same(dup, cpu.swiglu(gate, dy))
    wide, above = gate.double(), (dy * up).double()
    sigmoid = wide.sigmoid()
    exact = above * sigmoid * (1 + wide * (1 - sigmoid))
    magnitude = above.abs() * sigmoid * (1 + wide.abs())  # 1 - sigmoid loses digits, here and in the definition
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps * (1 + wide.abs())  # where above * sigmoid is subnormal
    error = (dgate.double() - exact).abs()
    assert (error <= HALF_UNIT[dtype] * exact.abs() + 2.0**-21 * magnitude + smallest).all()


def test_swiglu_in_fp32_of_what_is_not_finite_or_overflows() -> None:
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1e-45, -1e-45, 89.0, -88.8, -200.0]
    )
    gate, up, dy = (x.reshape(-1) for x in torch.meshgrid(special, special, special[:5], indexing="ij"))
    smallest = torch.finfo(torch.float32).smallest_normal * (1 + gate.abs())  # an exponential below it may be zero
    found, expected = ((m.swiglu(gate, up), *m.swiglu_backward(dy, gate, up)) for m in (cpu, definition))
    for ours, theirs, factor in zip(found, expected, (up, dy * up, dy), strict=True):
        assert_near(ours[:, None], theirs[:, None], 14, (smallest * factor.abs()).nan_to_num(0.0, 0.0, 0.0)[:, None])


# ---- dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)  # fmt: skip
def test_philox_gives_the_known_answers_of_its_authors_library(
    counter: tuple[int, ...], key: int, expected: tuple[int, ...]
) -> None:
    assert philox(torch.tensor(counter), key).tolist() == list(expected)


@every_dtype
@given(
    count=st.integers(0, 700),
    seed=st.integers(-(2**63), 2**63 - 1),
    p=st.floats(0, 1, exclude_max=True),
    bits=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_drop_is_the_definition(dtype: torch.dtype, count: int, seed: int, p: float, bits: bool) -> None:
    drawn = torch.tensor(seed)
    x = any_bits(count, dtype=dtype) if bits else torch.randn(count).to(dtype)
    assert_same(cpu.drop(x, drawn, p), definition.drop(x, drawn, p))
    tail = count // 3  # what is dropped depends on the place alone
    assert_same(cpu.drop(x[:tail], drawn, p), definition.drop(x, drawn, p)[:tail])


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_a_probability_of_dropping_must_be_one(p: float) -> None:
    for x in (torch.ones(3), torch.ones(3, dtype=torch.float64)):
        with pytest.raises(ValueError, match="must be from 0 to below 1, got"):
            cpu.drop(x, torch.tensor(0), p)


def test_all_but_one_in_billions_are_dropped_where_p_is_nearly_1() -> None:
    x, p = torch.ones(1000), 1 - 2.0**-40  # of which p·2^32 would round to a number that no word can hold
    assert_same(cpu.drop(x, torch.tensor(1), p), torch.zeros(1000))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.97])
def test_drop_drops_that_share_of_independent_elements(p: float) -> None:
    count = 1 << 20
    one, other = (cpu.drop(torch.ones(count), torch.tensor(seed), p) == 0 for seed in (1, 2))
    neighbours = one[1:] ^ one[:-1], one[16:] ^ one[:-16], one ^ other
    for share, places in ((p, one), (p, other), *((2 * p * (1 - p), pair) for pair in neighbours)):
        deviation = (share * (1 - share) / places.numel()) ** 0.5
        assert abs(float(places.double().mean()) - share) <= 6 * deviation


# ---- all of them ---------------------------------------------------------------------------------------------------


def results(tokens: int, dtype: torch.dtype, size: int = 64) -> list[Tensor]:
    torch.manual_seed(tokens)
    x, dy, z = torch.randn(3, tokens, 3 * size).to(dtype)
    weight, (cos, sin) = torch.randn(3 * size).to(dtype), torch.randn(2, tokens, size).to(dtype)
    y, rstd = cpu.rms_norm(x, weight, 1e-5)
    heads = x.view(tokens, 3, size)
    return [
        y, rstd, cpu.rms_norm_backward(dy, x, weight, rstd), *cpu.rope(heads, heads[:, :1], cos, sin),
        cpu.swiglu(x, z), *cpu.swiglu_backward(dy, x, z), cpu.drop(x, torch.tensor(tokens), 0.25),
    ]  # fmt: skip


# ---- the loss ------------------------------------------------------------------------------------------------------


@every_dtype
@given(
    rows=st.integers(1, 5),
    size=st.integers(1, 300),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=60)
def test_cross_entropy(dtype: torch.dtype, rows: int, size: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    logits, targets = (scale * torch.randn(rows, size)).to(dtype), torch.randint(size, (rows,))
    exact = logits.double().log_softmax(dim=-1)
    kept = logits.clone()
    losses = cpu.cross_entropy(kept, targets, False)
    assert_same(kept, logits)
    assert_same(cpu.cross_entropy(kept, targets, True), losses)
    expected = -exact.gather(1, targets[:, None])[:, 0]
    largest = logits.double().abs().amax(dim=1)
    assert ((losses.double() - expected).abs() <= 2.0**-23 * (expected + largest) + 1e-7).all()
    gradient = exact.exp() - torch.nn.functional.one_hot(targets, size)
    assert ((kept.double() - gradient).abs() <= 1.02 * HALF_UNIT[dtype] * gradient.abs() + 2.0**-22).all()


def test_cross_entropy_of_the_extremes() -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0.0, -inf, 1.0], [3e38, -3e38, 0.0], [nan, 0.0, 0.0], [inf, 0.0, 0.0], [-inf, -inf, -inf]])
    targets, theirs = torch.tensor([0, 0, 1, 1, 2]), logits.clone()
    found, expected = cpu.cross_entropy(logits, targets, True), definition.cross_entropy(theirs, targets, True)
    for ours, other in ((found, expected), (logits, theirs)):
        assert_same(ours.isnan(), other.isnan())
        assert_within(ours.nan_to_num(0.0), other.nan_to_num(0.0), rounding(8, other.nan_to_num(0.0).abs()))


def test_a_target_outside_of_the_vocabulary_is_named() -> None:
    for bad in (-1, 7):
        with pytest.raises(IndexError, match=f"target {bad} is outside the vocabulary of 7"):
            cpu.cross_entropy(torch.randn(2, 7), torch.tensor([0, bad]), True)


@every_dtype
def test_threads_and_instruction_sets_do_not_show(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, before = 1500, torch.get_num_threads()  # so many that the work is divided
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(results(tokens, dtype))
    finally:
        torch.set_num_threads(before)
    monkeypatch.setenv("LORAKIT_CPU_ISA", "generic")
    expected = results(tokens, dtype)
    for each in found:
        for ours, theirs in zip(each, expected, strict=True):
            assert_same(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 4)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    x, weight = torch.empty(shape), torch.empty(shape[-1:])
    for found, expected in zip(cpu.rms_norm(x, weight, 1e-5), definition.rms_norm(x, weight, 1e-5), strict=True):
        assert_same(found, expected)
    assert cpu.rms_norm_backward(x, x, weight, x.sum(-1, keepdim=True)).shape == shape
    assert cpu.swiglu(x, x).shape == cpu.drop(x, torch.tensor(1), 0.5).shape == shape
    assert cpu.swiglu_backward(x, x, x)[1].shape == shape
    empty = torch.empty(0, 8)
    assert cpu.rope(torch.empty(0, 2, 8), torch.empty(0, 1, 8), empty, empty)[0].shape == (0, 2, 8)


def test_views() -> None:
    x, dy, z = torch.randn(3, 40, 30).transpose(1, 2)
    weight = torch.randn(40, 2)[:, 0]
    (y, rstd), (expected, _) = cpu.rms_norm(x, weight, 1e-5), definition.rms_norm(x, weight, 1e-5)
    assert_alike(y, expected, terms=40 // 2 + 6)  # the root of a sum of 40
    assert_same(
        cpu.rms_norm_backward(dy, x, weight, rstd),
        cpu.rms_norm_backward(dy.contiguous(), x.contiguous(), weight.contiguous(), rstd),
    )
    assert_same(cpu.drop(x, torch.tensor(1), 0.5), cpu.drop(x.contiguous(), torch.tensor(1), 0.5))
    assert_same(cpu.swiglu(x, z[:]), cpu.swiglu(x.contiguous(), z.contiguous()))
    for found, expected in zip(
        cpu.swiglu_backward(dy, x, z), cpu.swiglu_backward(*(t.contiguous() for t in (dy, x, z))), strict=True
    ):
        assert_same(found, expected)


def test_what_cpp_does_not_take_is_computed_by_the_definition() -> None:
    wide, weight = torch.randn(4, 8, dtype=torch.float64), torch.randn(8)
    narrow, scalar = wide.bfloat16(), torch.randn(1)
    for x, by in product((wide, narrow), (weight.double(), scalar)):
        assert_same(cpu.rms_norm(x, by, 1e-5)[0], definition.rms_norm(x, by, 1e-5)[0])
        rstd = definition.rms_norm(x, by, 1e-5)[1]
        assert_same(cpu.rms_norm_backward(x, x, by, rstd), definition.rms_norm_backward(x, x, by, rstd))
    assert_same(cpu.swiglu(narrow.float(), narrow), definition.swiglu(narrow.float(), narrow))
    cos = sin = torch.randn(4, 8)  # fp32 tables of bf16 heads
    found, expected = (module.rope(narrow[:, None], narrow[:, None], cos, sin) for module in (cpu, definition))
    assert_same(found[0], expected[0])
    with pytest.raises(RuntimeError, match="must match the size"):
        cpu.rms_norm(narrow, torch.randn(5), 1e-5)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_registered_operation_is_computed_here(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAKIT_BACKEND", raising=False)  # where nobody chose otherwise
    assert getattr(dispatch.backend(torch.device("cpu")), operation) is getattr(cpu, operation)
