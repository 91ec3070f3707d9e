"""Rotary embedding: its algebra, its layout, and the published frequency scalings restated on their own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tolerances import assert_alike, assert_within, rounding

from lorakit.errors import ConfigError
from lorakit.layers import apply_rope, rope_frequencies, rope_tables

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_frequency(frequency: float, scaling: dict[str, Any]) -> float:
    """Meta's rule for one frequency, by wavelengths as in their code (llama-models, apply_scaling)."""
    wavelength = 2 * math.pi / frequency
    context = scaling["original_max_position_embeddings"]
    if wavelength < context / scaling["high_freq_factor"]:
        return frequency
    if wavelength > context / scaling["low_freq_factor"]:
        return frequency / scaling["factor"]
    span = scaling["high_freq_factor"] - scaling["low_freq_factor"]
    smooth = (context / wavelength - scaling["low_freq_factor"]) / span
    return (1 - smooth) * frequency / scaling["factor"] + smooth * frequency


@pytest.mark.parametrize(("head_dim", "theta"), [(2, 10_000.0), (64, 10_000.0), (128, 500_000.0)])
def test_frequencies_are_a_geometric_series(head_dim: int, theta: float) -> None:
    expected = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    exact = torch.tensor(expected, dtype=torch.float64)
    # An exponent that is rounded once moves the power by ln(theta) as much; the power has two units, the quotient one.
    assert_within(rope_frequencies(head_dim, theta), exact, rounding(math.ceil(math.log(theta)) + 3, exact))


@pytest.mark.parametrize("changes", [{}, {"factor": 32.0}, {"high_freq_factor": 16.0, "low_freq_factor": 2.0}])
def test_llama3_scaling_is_metas_rule(changes: dict[str, float]) -> None:
    scaling = LLAMA3 | changes
    plain = rope_frequencies(128, 500_000.0)
    expected = torch.tensor([llama3_frequency(f, scaling) for f in plain.double().tolist()], dtype=torch.float64)
    # Of the blend each half is a product of factors between 0 and 1, from a wavelength less a constant of its size.
    assert_within(rope_frequencies(128, 500_000.0, scaling), expected, rounding(12, plain))
    assert len(set((expected / plain).float().tolist())) > 2  # kept, stretched and blended ones all occur


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_linear_scaling_divides(key: str) -> None:
    scaled = rope_frequencies(16, 10_000.0, {key: "linear", "factor": 4})
    assert torch.equal(4 * scaled, rope_frequencies(16, 10_000.0))  # a power of two loses nothing


@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}])
def test_no_scaling(scaling: dict[str, Any] | None) -> None:
    assert torch.equal(rope_frequencies(8, 10_000.0, scaling), rope_frequencies(8, 10_000.0))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "lama3"}, "'lama3' is not supported; did you mean 'llama3'"),
        ({"rope_type": "yarn", "factor": 4.0}, "'yarn' is not supported .*known: default, linear, llama3"),
        ({"rope_type": "linear"}, "lacks 'factor'"),
        ({k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}, "lacks 'low_freq_factor'"),
        ({"rope_type": "linear", "factor": None}, "of type 'linear'"),
        ({"rope_type": "linear", "factor": "four"}, "four"),
    ],
)
def test_what_is_not_supported_is_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rope_frequencies(8, 10_000.0, scaling)


def test_halves_are_the_real_and_imaginary_parts_of_a_rotation() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(5, 3, 8), torch.randn(5, 1, 8)
    frequencies, positions = rope_frequencies(8, 100.0), torch.tensor([0, 1, 2, 30, 4])
    turn = torch.polar(torch.ones(5, 4), positions[:, None] * frequencies)
    for x, ours in zip((q, k), apply_rope(q, k, *rope_tables(frequencies, positions, torch.float32)), strict=True):
        turned = torch.complex(x[..., :4], x[..., 4:]) * turn[:, None]
        assert_alike(ours, torch.cat([turned.real, turned.imag], dim=-1), terms=5)  # sine (two), product, sum, result
        assert torch.equal(ours[0], x[0])  # position 0 is not turned


def test_gradients_are_those_of_a_rotation() -> None:
    torch.manual_seed(2)
    q, k = (torch.randn(5, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (3, 1))
    tables = rope_tables(rope_frequencies(8, 100.0), torch.tensor([0, 1, 0, 1, 2]), torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: apply_rope(q, k, *tables), (q, k))
    assert torch.autograd.gradcheck(lambda q: apply_rope(q, k.detach(), *tables)[0], (q,))


def test_products_depend_on_the_distance_alone() -> None:
    torch.manual_seed(1)
    q, k = torch.randn(1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 16, dtype=torch.float64)

    def product(m: int, n: int) -> torch.Tensor:
        tables = [rope_tables(rope_frequencies(16, 100.0), torch.tensor([i]), torch.float64) for i in (m, n)]
        return (apply_rope(q, k, *tables[0])[0] * apply_rope(q, k, *tables[1])[1]).sum()

    # Each of four angles is rounded to fp32: of up to 110 radians, by 110 units.
    assert_within(product(3, 10), product(103, 110), rounding(2 * (3 + 10 + 103 + 110), float(q.norm() * k.norm())))
    assert not torch.isclose(product(3, 10), product(3, 11), rtol=1e-3)


def test_tables_in_bfloat16_are_rounded_after_the_angles_not_before() -> None:
    positions = torch.arange(4000, 4008)
    cos, sin = rope_tables(rope_frequencies(8, 10_000.0), positions, torch.bfloat16)
    exact = positions[:, None].double() * rope_frequencies(8, 10_000.0).double()
    assert cos.dtype == sin.dtype == torch.bfloat16 and cos.shape == (8, 8)
    bound = rounding(1, 1.0, torch.bfloat16) + rounding(1, exact)  # of the table, of the angle
    assert_within(cos[:, :4], exact.cos(), bound)
    assert_within(sin[:, 4:], exact.sin(), bound)


def test_no_tokens() -> None:
    tables = rope_tables(rope_frequencies(8, 100.0), torch.arange(0), torch.float32)
    q, k = apply_rope(torch.empty(0, 2, 8), torch.empty(0, 1, 8), *tables)
    assert (q.shape, k.shape) == ((0, 2, 8), (0, 1, 8))
