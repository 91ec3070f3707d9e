"""The quantizer against an independent statement of its definition, and the promises of QuantizedWeight."""

from __future__ import annotations

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import rounding, unit

from lorakit.errors import ConfigError, ShapeError
from lorakit.quantization import BLOCK_SIZES, QUANT_TYPES, QuantizedWeight, codebook, dynamic_map, quantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = st.one_of(
    st.tuples(st.integers(0, 700)),
    st.tuples(st.integers(1, 40), st.integers(1, 150)),
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 40)),
)


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of any shape and dtype, of wildly differing magnitude, with zeros, ties and subnormals among them."""
    shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-30, 4))
    if draw(st.booleans()):
        weight = torch.where(torch.rand(shape, generator=generator) < 0.3, 0.0, weight)
    if draw(st.booleans()):
        weight = weight.sign() * draw(st.sampled_from([1.0, 2.0**-20]))  # every element on its block's absmax
    return weight.clamp(-6e4, 6e4).to(dtype)


quant_types, block_sizes = st.sampled_from(sorted(QUANT_TYPES)), st.sampled_from(BLOCK_SIZES)


def by_definition(weight: torch.Tensor, quant_type: str, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales straight from the definition, one element at a time, in numpy's fp32."""
    book, flat = codebook(quant_type), weight.reshape(-1).float().numpy()
    boundaries, order = book.boundaries.numpy(), book.order.numpy()
    codes, scales = [], []
    with np.errstate(all="ignore"):
        for start in range(0, len(flat), block_size):
            block = flat[start : start + block_size]
            absmax = np.float32(max(abs(block)))
            reciprocal = np.float32(1) / absmax
            scales.append(absmax)
            for x in block:
                scaled = np.float32(0) if x == 0 else np.float32(x * reciprocal)
                codes.append(order[sum(boundary < scaled for boundary in boundaries)])
    return np.array(codes, dtype=np.uint8), np.array(scales, dtype=np.float32)


@settings(max_examples=40, deadline=None)
@given(weights(), quant_types, st.sampled_from([32, 64, 256]))
def test_codes_and_scales_follow_the_definition(weight: torch.Tensor, quant_type: str, block_size: int) -> None:
    codes, scales = by_definition(weight, quant_type, block_size)
    ours = quantize(weight, quant_type, block_size, double_quant=False)
    assert np.array_equal(ours.codes.reshape(-1).numpy(), codes)
    assert np.array_equal(ours.absmax.numpy(), scales)


@given(weights(), quant_types, block_sizes)
def test_quantizing_the_values_again_gives_the_same_weight(
    weight: torch.Tensor, quant_type: str, block_size: int
) -> None:
    first = quantize(weight, quant_type, block_size, double_quant=False)
    if bool(((first.absmax != 0) & (first.absmax < 2.0**-126)).any()):
        return  # subnormal scales: codebook * absmax is not exact enough to find its way back
    second = quantize(first.dequantize(torch.float32), quant_type, block_size, double_quant=False)
    # An all-negative FP4 or positive block keeps its absmax: the codebooks hold -1 and 1 exactly.
    assert torch.equal(first.packed, second.packed)
    assert torch.equal(first.absmax, second.absmax)


@given(weights(), quant_types, block_sizes)
def test_error_is_at_most_half_a_code_gap_times_absmax(weight: torch.Tensor, quant_type: str, block_size: int) -> None:
    quantized = quantize(weight, quant_type, block_size, double_quant=False)
    values = codebook(quant_type).values.sort().values
    half_gap = float((values[1:] - values[:-1]).max()) / 2
    error = (quantized.dequantize(torch.float32) - weight.float()).abs().reshape(-1)
    bound = quantized.absmax.repeat_interleave(block_size)[: error.numel()] * half_gap
    assert bool((error <= bound * (1 + 2.0**-20) + 2.0**-149).all())


@given(weights(), quant_types, block_sizes, st.booleans(), st.integers(-3, 45), st.integers(-3, 45))
def test_a_row_slice_is_the_slice_of_the_whole(
    weight: torch.Tensor, quant_type: str, block_size: int, double_quant: bool, start: int, stop: int
) -> None:
    quantized = quantize(weight, quant_type, block_size, double_quant)
    rows = slice(start, stop)
    assert torch.equal(quantized.dequantize(rows=rows), quantized.dequantize()[rows])


@given(
    rows=st.integers(1, 40), columns=st.integers(1, 150), quant_type=quant_types, block_size=block_sizes,
    double_quant=st.booleans(), dtype=st.sampled_from(DTYPES), shape=st.sampled_from([(), (0,), (7,), (2, 3)]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_gathered_rows_are_those_of_the_whole(
    rows: int, columns: int, quant_type: str, block_size: int, double_quant: bool, dtype: torch.dtype,
    shape: tuple[int, ...], seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)  # odd widths too, and blocks that straddle rows
    quantized = quantize(torch.randn(rows, columns, generator=generator), quant_type, block_size, double_quant)
    ids = torch.randint(rows, shape, generator=generator)
    found = quantized.gather(ids, dtype)
    assert found.dtype == dtype and found.shape == (*shape, columns)
    assert torch.equal(found, quantized.dequantize(dtype)[ids])
    assert torch.equal(quantized.gather(ids), quantized.dequantize()[ids])


@given(weights(), quant_types, block_sizes, st.booleans())
def test_pickle_deepcopy_and_save_are_the_identity(
    weight: torch.Tensor, quant_type: str, block_size: int, double_quant: bool
) -> None:
    quantized = quantize(weight, quant_type, block_size, double_quant)
    buffer = io.BytesIO()
    torch.save(quantized, buffer)
    buffer.seek(0)
    copies = [
        pickle.loads(pickle.dumps(quantized)),
        copy.deepcopy(quantized),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        assert repr(other) == repr(quantized)
        assert torch.equal(other.packed, quantized.packed)
        assert torch.equal(other.dequantize(), quantized.dequantize())


@given(weights(), quant_types)
def test_a_view_that_is_not_contiguous_gives_the_codes_of_its_copy(weight: torch.Tensor, quant_type: str) -> None:
    if weight.dim() < 2:
        return
    view = weight.transpose(0, -1)
    assert torch.equal(quantize(view, quant_type).packed, quantize(view.contiguous(), quant_type).packed)


@given(weights(), block_sizes, st.booleans(), st.sampled_from(DTYPES))
def test_out_and_dtype_are_the_same_values_rounded_once(
    weight: torch.Tensor, block_size: int, double_quant: bool, dtype: torch.dtype
) -> None:
    quantized = quantize(weight, "nf4", block_size, double_quant)
    expected = quantized.dequantize(torch.float32).to(dtype)
    assert torch.equal(quantized.dequantize(dtype), expected)
    out = torch.full(weight.shape, float("nan"), dtype=dtype)
    assert quantized.dequantize(out=out) is out
    assert torch.equal(out, expected)


def test_double_quantization_takes_the_exact_nearest_code() -> None:
    absmax = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 3
    weight = torch.zeros(1000, 64)
    weight[:, 0] = absmax
    scales = quantize(weight, double_quant=True).scales
    assert not isinstance(scales, torch.Tensor)
    table, offset = dynamic_map().values.numpy(), np.float32(np.mean(absmax.numpy(), dtype=np.float64))
    rest = absmax.numpy() - offset
    for block in range(4):
        part = rest[block * 256 : (block + 1) * 256]
        peak = np.float32(np.abs(part).max())
        scaled = part * (np.float32(1) / peak)
        nearest = np.abs(table[None, :].astype(np.float64) - scaled[:, None].astype(np.float64)).min(axis=1)
        taken = table[scales.codes.numpy()[block * 256 : (block + 1) * 256]].astype(np.float64)
        # A midpoint rounded to fp32 may go either way.
        assert np.abs(np.abs(taken - scaled) - nearest).max() <= 2 * unit(torch.float32)
        assert scales.absmax[block] == peak


def test_bits_per_weight_at_64_and_256() -> None:
    quantized = quantize(torch.randn(2048, 2048))
    assert quantized.bits_per_weight == pytest.approx(4.127, abs=5e-4)
    assert quantized.nbytes == quantized.packed.nbytes + quantized.scales.nbytes
    assert quantize(torch.randn(2048, 2048), double_quant=False).bits_per_weight == 4.5


def test_zero_is_one_code_and_blocks_of_zeros_stay_zero() -> None:
    zeros = torch.tensor([0.0, -0.0] * 64)
    assert quantize(zeros, "nf4").packed.unique().tolist() == [0x77]
    assert quantize(zeros, "fp4").packed.unique().tolist() == [0x00]
    mixed = torch.cat([zeros, torch.ones(64)])
    for quant_type in QUANT_TYPES:
        back = quantize(mixed, quant_type, double_quant=False).dequantize()
        assert torch.equal(back, mixed.abs())


def test_a_scale_whose_reciprocal_overflows_is_still_right() -> None:
    tiny = 2.0**-149
    weight = torch.tensor([tiny, -tiny, 0.0] + [0.0] * 61)
    assert torch.equal(quantize(weight, double_quant=False).dequantize(), weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_inf_and_nan_are_refused_and_located(bad: float) -> None:
    weight = torch.randn(10, 64)
    weight[3, 5] = bad
    with pytest.raises(ShapeError, match=r"shape \(10, 64\) with inf or nan among elements 192 to 255"):
        quantize(weight)


def test_wrong_arguments_name_what_is_right() -> None:
    weight = torch.randn(4, 64)
    with pytest.raises(ConfigError, match="unknown quant_type 'nf5'; did you mean 'nf4'"):
        quantize(weight, "nf5")
    with pytest.raises(ConfigError, match=r"block_size 48 is not one of 32, 64"):
        quantize(weight, block_size=48)
    with pytest.raises(ShapeError, match=r"cannot quantize a tensor of torch\.int64"):
        quantize(weight.long())
    quantized = quantize(weight)
    with pytest.raises(ShapeError, match=r"out must be contiguous with shape \(4, 64\), got \(64, 4\)"):
        quantized.dequantize(out=torch.empty(64, 4))
    with pytest.raises(ShapeError, match=r"two dimensions, got shape \(64,\)"):
        quantize(torch.randn(64)).gather(torch.tensor([0]))
    with pytest.raises(ShapeError, match="step of 2"):
        quantized.dequantize(rows=slice(0, 4, 2))
    with pytest.raises(ShapeError, match=r"do not divide into elements of torch\.float32"):
        quantize(torch.randn(3, 3)).stored(torch.float32)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_float_storage_views_the_same_bytes(dtype: torch.dtype) -> None:
    quantized = quantize(torch.randn(8, 64))
    stored = quantized.stored(dtype)
    assert stored.dtype == dtype
    assert stored.data_ptr() == quantized.packed.data_ptr()
    assert torch.equal(stored.view(torch.uint8), quantized.packed.reshape(-1))


def test_the_source_is_not_changed_and_the_result_prints() -> None:
    weight = torch.randn(6, 64, dtype=torch.bfloat16, requires_grad=True)
    before = weight.detach().clone()
    quantized = quantize(weight)
    assert torch.equal(weight, before)
    assert isinstance(quantized, QuantizedWeight)
    assert repr(quantized) == (
        "QuantizedWeight(nf4, shape=(6, 64), dtype=bfloat16, block_size=64, 8-bit scales, 4.292 bits/weight, 206 bytes)"
    )


def test_error_report_matches_its_definitions() -> None:
    weight = torch.randn(16, 64)
    weight[11] *= 0  # a row of zeros has no error
    quantized = quantize(weight)
    report = quantized.error(weight)
    error = (quantized.dequantize(torch.float32) - weight).double()
    bound = float(rounding(weight.numel(), 1.0, torch.float64))  # of means and norms, relative
    assert report.mse == pytest.approx(float(error.square().mean()), rel=bound)
    assert report.max == float(error.abs().max())
    relative = float(error.norm() / weight.double().norm())
    assert report.relative_frobenius == pytest.approx(relative, rel=bound)
    assert report.snr_db == pytest.approx(-20 * math.log10(relative), rel=bound)
    rows = torch.nan_to_num(error.norm(dim=1) / weight.double().norm(dim=1))
    assert report.worst_row == int(rows.argmax())
    exact = quantize(torch.zeros(2, 64)).error(torch.zeros(2, 64))
    assert (exact.mse, exact.snr_db) == (0.0, math.inf)
    with pytest.raises(ShapeError, match="expected"):
        quantized.error(weight.T)
