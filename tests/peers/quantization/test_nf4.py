"""NF4 against bitsandbytes, bit for bit, on every linear weight of the real model.

Their double quantization is compared in one direction, our reading of their bytes: on the CPU they pick the 8-bit codes
of the scales from a table of 65,536 bins, which is not always the nearest code, and ours is.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit import QuantizedWeight, quantize
from lorakit.models import Checkpoint
from lorakit.quantization import NestedScales

bnb = importlib.import_module("bitsandbytes.functional")

BLOCK_SIZE = 64


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def weights(request: pytest.FixtureRequest, smollm2_folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every linear weight: in bf16 as the checkpoint has it, and in fp32 with random digits behind those of bf16."""
    checkpoint = Checkpoint(smollm2_folder)
    names = [name for name in checkpoint.names if name.endswith("_proj.weight")]
    assert len(names) == 210
    assert all(checkpoint.shape(name)[1] % BLOCK_SIZE == 0 for name in names)  # else their CPU kernel is wrong
    torch.manual_seed(0)
    read = ((name, checkpoint.read(name)) for name in names)
    return ((name, w if request.param == w.dtype else w.float() * (1 + torch.rand(w.shape) / 256)) for name, w in read)


def test_codes_scales_and_values(weights: Iterator[tuple[str, Tensor]]) -> None:
    for name, weight in weights:
        ours = quantize(weight, double_quant=False)
        packed, state = their_quantize(weight, compress_statistics=False)
        theirs = bnb.dequantize_4bit(packed, state)
        assert torch.equal(ours.packed.view(-1), packed.view(-1)), f"codes of {name}"
        assert torch.equal(ours.absmax, state.absmax), f"absmax of {name}"
        assert torch.equal(ours.code_values, state.code), "codebook"
        assert same_bits(ours.dequantize(), theirs), f"values of {name}"


def test_their_doubly_quantized_bytes(weights: Iterator[tuple[str, Tensor]]) -> None:
    for name, weight in weights:
        packed, state = their_quantize(weight, compress_statistics=True)
        nested = state.state2
        assert state.absmax.dtype == torch.uint8
        assert nested.blocksize == 256
        scales = NestedScales(state.absmax, nested.absmax, state.offset, nested.code, nested.blocksize)
        ours = QuantizedWeight(packed, scales, weight.shape, weight.dtype, "nf4", BLOCK_SIZE, state.code)
        assert same_bits(ours.dequantize(), bnb.dequantize_4bit(packed, state)), name


def test_the_dynamic_map() -> None:
    theirs = bnb.create_dynamic_map()
    assert torch.equal(NestedScales.quantize(torch.rand(10)).code_values, theirs)


def their_quantize(weight: Tensor, compress_statistics: bool) -> tuple[Tensor, Any]:
    return bnb.quantize_4bit(weight, quant_type="nf4", blocksize=BLOCK_SIZE, compress_statistics=compress_statistics)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of bytes, stricter than of values: 0.0 is not -0.0."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
