"""The codebooks: the formulas give the published values, and a new one is one line in the table."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_codebook import even

from lorakit.errors import ConfigError
from lorakit.layers import Linear4bit
from lorakit.quantization import QUANT_TYPES, codebook, quantize
from lorakit.quantization.codebooks import float4, normal_float
from lorakit.quantization.policy import QuantConfig

# Of bitsandbytes' files; QLoRA's appendix E prints the same numbers.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)  # as bitsandbytes prints them


def test_nf4_is_what_was_published_bit_for_bit() -> None:
    assert codebook("nf4").values.tolist() == list(NF4)


def test_fp4_is_what_was_published_bit_for_bit() -> None:
    magnitudes = torch.tensor(FP4, dtype=torch.float32)
    found = codebook("fp4").values
    assert torch.equal(found, torch.cat([magnitudes, -magnitudes]))
    assert not found.signbit()[[0, 8]].any()  # both zeros are +0.0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_normal_float_has_an_exact_zero_and_ends_and_one_more_value_above(bits: int) -> None:
    values = normal_float(bits, 0.9677083)
    assert len(values) == 2**bits and torch.equal(values, values.unique())
    assert (values[0], values[-1]) == (-1, 1)
    assert values[2 ** (bits - 1) - 1] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_values_are_fp32_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = normal_float(4, 0.9677083), float4()
    finally:
        torch.set_default_dtype(before)
    for values, name in zip(found, ("nf4", "fp4"), strict=True):
        assert values.dtype == torch.float32 and torch.equal(values, codebook(name).values)


def test_a_new_codebook_rounds_to_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANT_TYPES, "even", even)
    steps = 2 * torch.randint(0, 16, (6, 64)).float() - 15
    steps[:, 0] = 15  # the largest of each block, so that all others are one of the values times it
    quantized = quantize(steps + 0.9 * (torch.rand_like(steps) * steps.abs().lt(15)), "even", double_quant=False)
    assert quantized.quant_type == "even" and torch.equal(quantized.code_values, torch.linspace(-1, 1, 16))
    assert torch.equal(quantized.dequantize().round(), steps)
    layer = Linear4bit.from_linear(nn.Linear(64, 6), "even")
    assert torch.equal(layer(torch.eye(64)), layer.dense_weight(torch.float32).T + layer.bias)  # zeros add nothing
    formats = QuantConfig(quant_type="even").assign(["q_proj"])
    assert formats["q_proj"] is not None and formats["q_proj"].quant_type == "even"


def test_values_may_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANT_TYPES, "even", even)
    for block_size, power in ((64, 1), (128, 3)):
        quantized = quantize(torch.randn(4, 256), "even", block_size)
        assert torch.equal(quantized.code_values, torch.linspace(-1, 1, 16) ** power)
        assert torch.equal(codebook("even", block_size).values, quantized.code_values)


def test_where_a_codebook_is_first_asked_for_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANT_TYPES, "even", even)
    with torch.device("meta"), torch.inference_mode():
        values = codebook("even").values
    assert values.is_cpu and not values.is_inference()


def test_a_name_that_is_not_in_the_table_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown quant_type 'nf5'; did you mean 'nf4'\? \(known: nf4, fp4\)"):
        codebook("nf5")
