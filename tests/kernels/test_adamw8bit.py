"""One step of AdamW with 8-bit moments: C++ against the definition bit for bit, the definition against its formula."""

from __future__ import annotations

import math
import shutil

import lorakit_kernels as kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lorakit_kernels import STATE_BLOCK_SIZE, AdamWStep, Moment8bit, cpu, reference
from tolerances import assert_within, rounding
from torch import Tensor
from torch.library import opcheck

from lorakit.quantization import dynamic_map

SETS = cpu.instruction_sets()
SIGNED, UNSIGNED = ((table.values, table.boundaries) for table in (dynamic_map(), dynamic_map(signed=False)))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HYPER = (1e-2, 0.9, 0.999, 1e-8, 0.1)  # lr, betas, eps, weight_decay

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")


def moments(state: list[Tensor]) -> tuple[Moment8bit, Moment8bit]:
    """Codes and scales of both moments, with the tables that the codes stand in."""
    return Moment8bit(*state[:2], *SIGNED), Moment8bit(*state[2:], *UNSIGNED)


def fresh(count: int) -> list[Tensor]:
    """The state before the first step: both moments zero."""
    blocks = -(-count // STATE_BLOCK_SIZE)
    codes = torch.full((count,), dynamic_map().zero, dtype=torch.uint8)
    return [codes, torch.zeros(blocks), torch.zeros(count, dtype=torch.uint8), torch.zeros(blocks)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A parameter, a gradient and any state, of any length; gradients ordinary, sparse, tiny, of many magnitudes."""
    count = draw(st.one_of(st.integers(0, 600), st.integers(0, 5000)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    g = torch.randn(count, generator=random)
    match draw(st.sampled_from(["ordinary", "sparse", "tiny", "lognormal", "zeros"])):
        case "sparse":
            g *= torch.rand(count, generator=random) < 0.1
        case "tiny":  # squares are subnormal or zero
            g *= 2.0 ** draw(st.integers(-140, -60))
        case "lognormal":
            g *= torch.exp(4 * torch.randn(count, generator=random))
        case "zeros":
            g.zero_()
    state = fresh(count)
    if draw(st.booleans()):
        for codes, absmax in (state[:2], state[2:]):
            codes.copy_(torch.randint(256, (count,), generator=random))
            absmax.copy_(torch.rand(len(absmax), generator=random) * 10.0 ** draw(st.integers(-30, 3)))
    p = torch.randn(count, generator=random).to(dtype)
    return p, g.to(dtype).nan_to_num(posinf=1.0, neginf=-1.0), state


@pytest.mark.parametrize("instruction_set", SETS)
@needs_compiler
@given(problem=problems(), step=st.integers(1, 5000), hyper=st.sampled_from([HYPER, (3e-4, 0.95, 0.9, 1e-5, 0.0)]))
@settings(deadline=None, max_examples=100)
def test_cpp_is_the_definition_bit_for_bit(
    instruction_set: str, problem: tuple[Tensor, Tensor, list[Tensor]], step: int, hyper: tuple[float, ...]
) -> None:
    p, g, state = problem
    found, expected = [p.clone(), *(t.clone() for t in state)], [p.clone(), *(t.clone() for t in state)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAKIT_CPU_ISA", instruction_set)
        cpu.adamw_8bit(found[0], g, *moments(found[1:]), AdamWStep(*hyper, step))
    reference.adamw_8bit(expected[0], g, *moments(expected[1:]), AdamWStep(*hyper, step))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@needs_compiler
def test_threads_do_not_show() -> None:
    count = (1 << 18) + 77  # so many that the work is divided
    g = torch.randn(count)
    results = []
    for threads in (1, 8):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        p, state = torch.ones(count), fresh(count)
        for step in (1, 2):
            cpu.adamw_8bit(p, g, *moments(state), AdamWStep(*HYPER, step))
        torch.set_num_threads(before)
        results.append([p, *state])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def exact_step(p: float, g: float, m: float, v: float, step: int) -> tuple[float, float, float]:
    """Loshchilov and Hutter's algorithm 2 in Python's floats; returns p, m and v."""
    lr, beta1, beta2, eps, decay = HYPER
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return p - lr * decay * p - lr * m_hat / (math.sqrt(v_hat) + eps), m, v


@given(problem=problems(), step=st.integers(1, 1000))
@settings(deadline=None, max_examples=40)
def test_the_definition_is_the_formula(problem: tuple[Tensor, Tensor, list[Tensor]], step: int) -> None:
    p, g, state = problem
    p, g = p.float()[:300], g.float()[:300]
    state = [t[: 300 if t.dtype == torch.uint8 else 2].clone() for t in state]
    m = reference.dequantize_8bit(state[0], SIGNED[0], state[1], STATE_BLOCK_SIZE)
    v = reference.dequantize_8bit(state[2], UNSIGNED[0], state[3], STATE_BLOCK_SIZE)
    exact = [exact_step(*numbers, step) for numbers in zip(*(t.tolist() for t in (p, g, m, v)), strict=True)]
    found = p.clone()
    reference.adamw_8bit(found, g, *moments(state), AdamWStep(*HYPER, step))
    expected = torch.tensor(exact, dtype=torch.float64).reshape(-1, 3)
    # Factors, moments, root, quotient and update are some ten roundings of what is at most lr·(1 - beta1^t)^-1 times
    # |m| / sqrt(v); the parameter itself has three.
    change = (expected[:, 0] - (1 - HYPER[0] * HYPER[4]) * p.double()).abs()
    magnitude = HYPER[0] / (1 - HYPER[1] ** step) * (HYPER[1] * m.abs() + (1 - HYPER[1]) * g.abs())
    magnitude = magnitude / (expected[:, 2].sqrt() / math.sqrt(1 - HYPER[2] ** step) + HYPER[3])
    assert_within(found, expected[:, 0], rounding(3, p.abs() + change) + rounding(16, magnitude))
    for moment, codes, absmax, (values, _) in (
        (expected[:, 1], *state[:2], SIGNED),
        (expected[:, 2], *state[2:], UNSIGNED),
    ):
        scale = absmax.repeat_interleave(STATE_BLOCK_SIZE)[: len(moment)].double()
        usable = scale > 2.0**-120  # below, the reciprocal of the scale overflows
        distance = (values.double()[:, None] * scale - moment).abs()
        chosen = distance[codes.long(), torch.arange(len(moment))]
        assert (chosen <= distance.amin(dim=0) + 1e-5 * moment.abs())[usable].all()  # no code is nearer


def test_an_element_without_gradient_stays_where_it_is() -> None:
    p, state = torch.randn(1000), fresh(1000)
    start, never = p.clone(), torch.arange(1000) % 3 == 0
    for step in range(1, 20):
        g = torch.randn(1000) * 10.0 ** (step % 7)
        g[never] = 0
        kernels.adamw_8bit(p, g, *moments(state), AdamWStep(1e-2, 0.9, 0.999, 1e-8, 0.0, step))
    assert torch.equal(p[never], start[never])
    assert (p[~never] != start[~never]).all()
    assert (state[0][never] == dynamic_map().zero).all() and (state[2][never] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])  # of Triton see test_triton.py
@pytest.mark.parametrize("dtype", DTYPES)
def test_pytorch_accepts_the_operation(backend: str, dtype: torch.dtype) -> None:
    first, second = moments(fresh(385))
    arguments = (torch.randn(5, 77, dtype=dtype), torch.randn(5, 77, dtype=dtype), *first, *second, *HYPER, 3)
    with kernels.use_backend(backend):
        opcheck(torch.ops.lorakit.adamw_8bit.default, arguments)


def test_strides_do_not_matter() -> None:
    p, g = torch.randn(70, 80), torch.randn(70, 80)
    turned, state, other = p.T.contiguous().T, fresh(5600), fresh(5600)
    kernels.adamw_8bit(p, g, *moments(state), AdamWStep(*HYPER, 1))
    kernels.adamw_8bit(turned, g.T.contiguous().T, *moments(other), AdamWStep(*HYPER, 1))
    assert not turned.is_contiguous()
    assert torch.equal(turned, p) and all(torch.equal(a, b) for a, b in zip(state, other, strict=True))


@needs_compiler
def test_what_does_not_fit_is_refused() -> None:
    parameter, gradient, (first, second) = torch.zeros(300), torch.zeros(300), moments(fresh(300))
    step = AdamWStep(*HYPER, 1)
    with pytest.raises(ValueError, match=r"gradient must have at least 300 elements of torch.float32"):
        cpu.adamw_8bit(parameter, gradient.half(), first, second, step)
    for change, message in (
        ({"codes": torch.zeros(299, dtype=torch.uint8)}, r"first\.codes must have at least 300 elements .* got 299"),
        ({"absmax": torch.zeros(1)}, r"first\.absmax must have at least 2 elements"),
        ({"codes": torch.zeros(600, dtype=torch.uint8)[::2]}, r"first\.codes must be contiguous"),
        ({"boundaries": first.boundaries[1:]}, r"first\.boundaries must have at least 255 elements"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.adamw_8bit(parameter, gradient, first._replace(**change), second, step)
