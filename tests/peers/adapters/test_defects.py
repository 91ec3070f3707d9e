"""Where bitsandbytes 0.50.2 is wrong on the CPU, and lorakit is right.

Each test holds lorakit to the definition. What bitsandbytes gives is asserted too where its faulty path runs at all:
some need AVX-512, some AVX-512 BF16; elsewhere it takes a slower, correct path.
"""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional as F
from tolerances import assert_within, unit
from torch import Tensor, nn

from lorakit import quantize
from lorakit.layers import Linear4bit
from lorakit.quantization import NestedScales, dynamic_map

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
AVX512_BF16 = AVX512 and F.has_avx512bf16()


@pytest.fixture
def dense() -> nn.Linear:
    """A layer whose weight rows differ in scale, so that a scale taken from a wrong row shows."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 64, dtype=torch.bfloat16)
    layer.weight.data *= torch.logspace(-2, 1, 64)[:, None]
    return layer.requires_grad_(False)


def theirs_of(dense: nn.Linear, nested: bool = False) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(
        dense.in_features, dense.out_features, dense.bias is not None, torch.bfloat16, nested, quant_type="nf4"
    )
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu").requires_grad_(False)


def by_definition(weight: Tensor, block_size: int) -> Tensor:
    """The dequantized values, from codes and scales, without any kernel."""
    quantized = quantize(weight, "nf4", block_size, double_quant=False)
    scale = quantized.absmax.repeat_interleave(block_size)[: weight.numel()].view(weight.shape)
    return (quantized.code_values[quantized.codes.int()] * scale).to(weight.dtype)


@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((64, 96), 64), ((64, 48), 64), ((64, 160), 128), ((64, 80), 32), ((1152, 4304), 64)],
    ids=str,
)
def test_1_rows_that_are_not_a_multiple_of_the_block(shape: tuple[int, int], block_size: int) -> None:
    """bitsandbytes takes scales of the wrong blocks: most values of (1152, 4304), a real vision layer, are wrong."""
    weight = torch.randn(shape, dtype=torch.bfloat16) * torch.logspace(-1, 1, shape[0])[:, None].bfloat16()
    expected = by_definition(weight, block_size)
    assert torch.equal(quantize(weight, "nf4", block_size, double_quant=False).dequantize(), expected)
    if AVX512:
        theirs = F.dequantize_4bit(*F.quantize_4bit(weight, blocksize=block_size, quant_type="nf4"))
        assert (theirs != expected).float().mean() > 0.75


def test_2_gradients_after_evaluation(dense: nn.Linear) -> None:
    """After one forward pass in eval mode, bitsandbytes returns no gradient for x in training."""
    dense.bias = None  # with a bias, bitsandbytes raises instead
    ours, x = Linear4bit.from_linear(dense), torch.randn(4, 128, dtype=torch.bfloat16, requires_grad=True)
    ours.eval()(x.detach())
    ours.train()(x).sum().backward()
    expected = torch.ones(4, 64, dtype=torch.bfloat16) @ ours.dense_weight(torch.bfloat16)
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
    if AVX512_BF16:
        theirs, y = theirs_of(dense), torch.randn(4, 128, dtype=torch.bfloat16, requires_grad=True)
        theirs.eval()(y.detach())
        with pytest.warns(UserWarning, match="autograd"):
            theirs.train()(y).sum().backward()
        assert y.grad is None


def test_3_dequantizing_after_evaluation(dense: nn.Linear) -> None:
    """Merging reads the dequantized weight; after eval, bitsandbytes' has nothing to do with the layer's."""
    ours = Linear4bit.from_linear(dense, double_quant=False)
    before = ours.dense_weight(torch.bfloat16)
    ours.eval()(torch.randn(4, 128, dtype=torch.bfloat16))
    assert torch.equal(ours.dense_weight(torch.bfloat16), before)
    if AVX512_BF16:
        theirs = theirs_of(dense)
        theirs.eval()(torch.randn(4, 128, dtype=torch.bfloat16))
        after = F.dequantize_4bit(theirs.weight, theirs.weight.quant_state)
        assert (after.reshape(-1) - before.reshape(-1)).norm() > 0.5 * before.norm()


@pytest.mark.parametrize("nested", [False, True])
def test_4_saving_after_evaluation(dense: nn.Linear, nested: bool) -> None:
    """After eval, bitsandbytes saves bf16 scales in another order (plain), or other scales (nested)."""
    ours = Linear4bit.from_linear(dense, double_quant=nested)
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    ours.eval()(torch.randn(4, 128, dtype=torch.bfloat16))
    assert all(torch.equal(tensor, before[key]) for key, tensor in ours.state_dict().items())
    if AVX512_BF16:
        theirs = theirs_of(dense, nested)
        saved = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
        theirs.eval()(torch.randn(4, 128, dtype=torch.bfloat16))
        later = theirs.state_dict()
        changed = [k for k in saved if "absmax" in k or "quant_state" in k]
        assert any(k not in later or not _same(saved[k], later[k]) for k in changed)


@pytest.mark.parametrize("shape", [(33, 128), (64, 96)], ids=str)
def test_5_evaluation_of_any_shape(shape: tuple[int, int]) -> None:
    """bitsandbytes' eval path fails for 33 rows (not a multiple of 32) and for 96 columns (not of the block)."""
    dense = nn.Linear(shape[1], shape[0], dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(3, shape[1], dtype=torch.bfloat16)
    ours = Linear4bit.from_linear(dense).eval()
    assert torch.equal(ours(x), nn.functional.linear(x, ours.dense_weight(torch.bfloat16), dense.bias))
    if AVX512_BF16:
        with pytest.raises((AssertionError, RuntimeError)):
            theirs_of(dense).eval()(x)


def test_6_the_nearest_8_bit_code() -> None:
    """bitsandbytes looks 8-bit codes up in 65,536 bins, and misses the nearest: an exact zero does not stay zero."""
    values, table = torch.linspace(-1, 1, 65_537), dynamic_map().values
    ours = NestedScales.quantize(values).codes  # their mean is 0
    scaled = values.split(256)
    nearest = torch.cat([(part / part.abs().max())[:, None].sub(table).abs().min(1).values for part in scaled])
    taken = torch.cat([part / part.abs().max() for part in scaled]) - table[ours.int()]
    # A midpoint rounded to fp32 may go either way; all differences are rounded.
    assert_within(taken.abs(), nearest, 4 * unit(torch.float32))
    zeros = torch.tensor([0.0, 1.0, -1.0, 0.0])
    assert NestedScales.quantize(zeros)[:][0] == 0
    codes, state = F.quantize_blockwise(zeros, blocksize=256)
    assert F.dequantize_blockwise(codes, state)[0] != 0


def test_7_dequantizing_into_a_buffer(dense: nn.Linear) -> None:
    """bitsandbytes raises NotImplementedError for `out=` on the CPU."""
    quantized = quantize(dense.weight)
    out = torch.empty_like(dense.weight)
    assert quantized.dequantize(out=out) is out
    assert torch.equal(out, quantized.dequantize())
    packed, state = F.quantize_4bit(dense.weight, quant_type="nf4")
    with pytest.raises(NotImplementedError):
        F.dequantize_4bit(packed, state, out=out)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
