"""Embedding4bit gives the rows of the dequantized table, bit for bit, and nothing changes its bytes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lorakit.errors import ShapeError
from lorakit.layers import Embedding4bit
from lorakit.quantization import quantize


def embedding(rows: int = 50, columns: int = 24, double_quant: bool = True, block_size: int = 64) -> Embedding4bit:
    torch.manual_seed(0)
    return Embedding4bit(quantize(torch.randn(rows, columns), "nf4", block_size, double_quant))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("columns", [1, 7, 24, 33, 128])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_those_of_the_dequantized_table(
    quant_type: str, columns: int, double_quant: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    dense = nn.Embedding(300, columns).to(dtype)
    layer = Embedding4bit.from_embedding(dense, quant_type, 32, double_quant)
    table = layer.quantized.dequantize(dtype)
    for shape in [(), (0,), (5,), (2, 3), (300,)]:
        ids = torch.randint(300, shape)
        found = layer(ids)
        assert found.dtype == dtype and torch.equal(found, table[ids])


@pytest.mark.parametrize("storage_dtype", [torch.bfloat16, torch.float32])
def test_any_storage_dtype(storage_dtype: torch.dtype) -> None:
    weight = quantize(torch.randn(16, 24))
    ids = torch.arange(16)
    assert torch.equal(Embedding4bit(weight, storage_dtype=storage_dtype)(ids), Embedding4bit(weight)(ids))


@pytest.mark.parametrize(
    "change",
    [lambda m: m.bfloat16(), nn.Module.eval, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["bfloat16", "eval", "deepcopy", "pickle"],
)
def test_no_conversion_changes_a_byte(change: Callable[[nn.Module], nn.Module]) -> None:
    layer = embedding()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    ids = torch.arange(50)
    expected = layer(ids)
    changed = change(layer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in changed.state_dict().items())
    assert torch.equal(changed(ids), expected)


def test_compiles_whole() -> None:
    layer, ids = embedding(), torch.tensor([[3, 4], [49, 0]])
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(ids), layer(ids))


@pytest.mark.parametrize("bad", [-1, 50])
def test_an_id_outside_the_table_is_named(bad: int) -> None:
    with pytest.raises(ShapeError, match=f"id {bad} is outside the table of 50 embeddings"):
        embedding()(torch.tensor([0, bad]))


def test_a_table_has_two_dimensions() -> None:
    with pytest.raises(ShapeError, match=r"Embedding4bit needs a weight of two dimensions, got shape \(10,\)"):
        Embedding4bit(quantize(torch.randn(10)))
