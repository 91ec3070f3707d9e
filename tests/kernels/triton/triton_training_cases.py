"""Triton's kernels of a training step against their definitions, in the interpreter.

Run as: TRITON_INTERPRET=1 pytest tests/kernels/triton/triton_training_cases.py (as test_triton.py does).

Bit for bit where no sum and no function is in the way: the kernels compute in fp32 and round once at the end, so the
definition in fp32 is rounded once too. The interpreter cuts fp32 off to bf16 where GPUs round to nearest.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lorakit_kernels import STATE_BLOCK_SIZE, AdamWStep, Moment8bit, reference, triton
from tolerances import assert_within, rounding, unit
from torch import Tensor

from lorakit.layers import rope_frequencies, rope_tables
from lorakit.quantization import dynamic_map

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def stored(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp32 numbers as the interpreter stores them."""
    if dtype == torch.bfloat16:
        wide = (wide.view(torch.int32) & -65536).view(torch.float32)
    return wide.to(dtype)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def of_store(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how far `stored` may take numbers near these: half a unit, or a whole one where bits are cut off."""
    if dtype == torch.float32:
        return torch.zeros_like(exact)
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # of the subnormal numbers
    return (2 if dtype == torch.bfloat16 else 1) * unit(dtype) * 1.01 * exact.abs() + smallest


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (2, 3, 77), (130, 64), (5, 2049), (0, 8), (7,)])
@pytest.mark.parametrize("wide_weight", [False, True])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, wide_weight: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    weight = torch.randn(shape[-1]).to(torch.float32 if wide_weight else dtype)
    y, rstd = triton.rms_norm(x, weight, 1e-5)
    exact = (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert rstd.dtype == torch.float32
    assert_within(rstd, exact, rounding(shape[-1] // 2 + 6, exact))  # the root of a sum
    dtype_of_y = torch.promote_types(dtype, weight.dtype)
    assert_same(y, stored(weight.float() * stored(x.float() * rstd, dtype).float(), dtype_of_y))
    dy = torch.randn(shape).to(y.dtype)
    dx = triton.rms_norm_backward(dy, x, weight, rstd)
    g, normed, wide = dy.double() * weight.double(), x.double() * rstd.double(), rstd.double()
    exact = (g - normed * (g * normed).mean(-1, keepdim=True)) * wide
    magnitude = (g.abs() + normed.abs() * (g * normed).abs().mean(-1, keepdim=True)) * wide
    assert dx.dtype == dtype
    assert_within(dx, exact, rounding(shape[-1] + 8, magnitude) + of_store(exact, dtype))


@every_dtype
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 2), (3, 1, 10), (9, 3, 64), (4, 4, 6)])
@pytest.mark.parametrize("backward", [False, True])
def test_rope(heads: int, kv_heads: int, dim: int, backward: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 4000])  # packed sequences
    tables = rope_tables(rope_frequencies(dim, 100.0), positions, dtype)
    q, k = (torch.randn(len(positions), count, dim).to(dtype) for count in (heads, kv_heads))
    wide = reference.rope(*(x.float() for x in (q, k, *tables)), backward)
    for found, expected in zip(triton.rope(q, k, *tables, backward), wide, strict=True):
        assert_same(found, stored(expected, dtype))


@every_dtype
def test_rope_backward_undoes_forward(dtype: torch.dtype) -> None:
    tables = rope_tables(rope_frequencies(8, 100.0), torch.arange(5), dtype)
    q, k = torch.randn(5, 3, 8).to(dtype), torch.randn(5, 2, 8).to(dtype)
    back = triton.rope(*triton.rope(q, k, *tables), *tables, True)
    for found, expected in zip(back, (q, k), strict=True):
        pair = expected.double().abs() + expected.double().abs().roll(4, -1)
        # Both results and, in cos² + sin², the tables are rounded; a rotation makes one error into two.
        assert_within(found, expected, 5 * of_store(pair, dtype) + rounding(10, pair))


def test_rope_of_no_tokens_and_of_views() -> None:
    empty = torch.empty(0, 8)
    assert triton.rope(torch.empty(0, 2, 8), torch.empty(0, 1, 8), empty, empty)[0].shape == (0, 2, 8)
    joint = torch.randn(4, 3, 8)
    tables = rope_tables(rope_frequencies(8, 100.0), torch.arange(4), torch.float32)
    q, k = joint.split([2, 1], dim=1)  # not contiguous
    for found, expected in zip(triton.rope(q, k, *tables), reference.rope(q, k, *tables), strict=True):
        assert_same(found, expected)


@every_dtype
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 1023), (1025,), (0, 4)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    gate, up, dy = ((4 * torch.randn(shape)).to(dtype) for _ in range(3))
    y, (dgate, dup) = triton.swiglu(gate, up), triton.swiglu_backward(dy, gate, up)
    assert y.dtype == dgate.dtype == dup.dtype == dtype
    g, u, above = gate.double(), up.double(), dy.double()
    sigmoid = g.sigmoid()
    for found, exact in ((y, g * sigmoid * u), (dup, g * sigmoid * above)):
        # e^-g is right to two roundings; 1 + e^-g, its inverse and two products
        assert_within(found, exact, rounding(6, exact.abs()) + of_store(exact, dtype))
    exact = above * u * sigmoid * (1 + g * (1 - sigmoid))
    magnitude = (above * u).abs() * sigmoid * (1 + g.abs())  # 1 - sigmoid loses digits
    assert_within(dgate, exact, rounding(14, magnitude) + of_store(exact, dtype))


@every_dtype
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 1023), (1025,), (0, 4), (5, 64)])
@pytest.mark.parametrize(("seed", "p"), [(0, 0.05), (2**63 - 1, 0.5), (-3, 0.9), (1, 0.0)])
def test_drop_is_the_definition(shape: tuple[int, ...], seed: int, p: float, dtype: torch.dtype) -> None:
    x, drawn = torch.randn(shape).to(dtype), torch.tensor(seed)
    found, expected = triton.drop(x, drawn, p), reference.drop(x, drawn, p)
    assert found.dtype == dtype and torch.equal(found, expected)
    assert torch.equal(triton.drop(x.T, drawn, p), reference.drop(x.T, drawn, p))


@every_dtype
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (5, 3), (4, 100), (7, 130), (0, 5)])
@pytest.mark.parametrize("tile", [64, 4096])
def test_cross_entropy(
    rows: int, vocabulary: int, tile: int, scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("lorakit_kernels.triton.cross_entropy")
    monkeypatch.setattr(module, "_TILE", tile)  # small: a row is several tiles, the last one short
    torch.manual_seed(3)
    logits, targets = (scale * torch.randn(rows, vocabulary)).to(dtype), torch.randint(vocabulary, (rows,))
    targets[:1], targets[1:2] = 0, vocabulary - 1
    untouched = logits.clone()
    wide = logits.double()
    losses = triton.cross_entropy(untouched, targets, False)
    assert torch.equal(untouched, logits)
    assert torch.equal(triton.cross_entropy(logits, targets, True), losses)
    exact = wide.log_softmax(-1)
    expected = -exact.gather(1, targets[:, None])[:, 0]
    # The logits less their maximum, and the loss; the exponentials and their sum, which each tile scales once more.
    tiles = -(-vocabulary // tile)
    bound = rounding(4, wide.abs().amax(1) + expected) + rounding(vocabulary + 4 * tiles + 4, 1.0)
    assert_within(losses, expected, bound)
    gradient = exact.exp() - torch.nn.functional.one_hot(targets, vocabulary)
    bound = (bound[:, None] + rounding(4, 1.0)) * exact.exp() + rounding(1, gradient.abs())
    smallest = torch.finfo(torch.float32).smallest_normal  # an exponential below it may be zero
    assert_within(logits, gradient, bound + of_store(gradient, dtype) + smallest)


def test_cross_entropy_shows_what_is_not_finite() -> None:
    logits = torch.zeros(3, 10)
    logits[0, 4], logits[1, 4], logits[2, 4] = float("nan"), float("-inf"), 3.4e38
    losses = triton.cross_entropy(logits, torch.tensor([0, 0, 4]), True)
    assert losses.isfinite().tolist() == [False, True, True]
    assert logits[1, 4] == 0 and not logits[0].isfinite().any()


@pytest.mark.parametrize("shape", [(3, 4, 5), (6, 5)])
def test_cross_entropy_refuses_what_it_cannot_overwrite(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="logits must be"):
        triton.cross_entropy(torch.zeros(shape)[:, ::2], torch.zeros(shape[0], dtype=torch.int64), True)


@given(
    count=st.integers(1, 3000), dtype=st.sampled_from(DTYPES), step=st.integers(1, 2000), seed=st.integers(0, 2**32),
    exponent=st.integers(-30, 3), spread=st.sampled_from([0, 1, 4]),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_adamw_8bit(count: int, dtype: torch.dtype, step: int, seed: int, exponent: int, spread: int) -> None:
    random = torch.Generator().manual_seed(seed)
    signed, unsigned = ((table.values, table.boundaries) for table in (dynamic_map(), dynamic_map(signed=False)))
    g = torch.randn(count, generator=random) * torch.exp(spread * torch.randn(count, generator=random))
    g = (g * (torch.rand(count, generator=random) < 0.8)).to(dtype).nan_to_num(posinf=1.0, neginf=-1.0)
    p = torch.randn(count, generator=random).to(dtype)
    blocks = -(-count // STATE_BLOCK_SIZE)
    state = [
        part
        for scale in (1.0, 10.0**exponent)
        for part in (
            torch.randint(256, (count,), generator=random).to(torch.uint8),
            torch.rand(blocks, generator=random) * scale,
        )
    ]
    found, expected = [p.clone(), *(x.clone() for x in state)], [p.float(), *(x.clone() for x in state)]
    settings_of_step = AdamWStep(1e-2, 0.9, 0.999, 1e-8, 0.1, step)
    for module, (parameter, *moments) in ((triton, found), (reference, expected)):
        first, second = Moment8bit(*moments[:2], *signed), Moment8bit(*moments[2:], *unsigned)
        module.adamw_8bit(parameter, g.to(parameter.dtype), first, second, settings_of_step)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(ours, theirs)
    assert_same(found[0], stored(expected[0], dtype))


def test_adamw_8bit_refuses_what_does_not_fit() -> None:
    p, codes, absmax = torch.zeros(300), torch.zeros(300, dtype=torch.uint8), torch.zeros(2)
    good = Moment8bit(codes, absmax, dynamic_map().values, dynamic_map().boundaries)
    step = AdamWStep(1e-2, 0.9, 0.99, 1e-8, 0.0, 1)
    with pytest.raises(ValueError, match=r"second\.absmax must have at least 2 elements"):
        triton.adamw_8bit(p, p.clone(), good, good._replace(absmax=absmax[:1]), step)
