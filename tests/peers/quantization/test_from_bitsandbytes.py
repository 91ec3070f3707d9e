"""The tables of the page "From bitsandbytes": each row's code is run on both sides and the results compared."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made import small_config, small_decoder, write_checkpoint
from migration_rows import Names, Row, rows_of, run
from tolerances import assert_within, matmul_rounding, unit
from torch import Tensor, nn

import lorakit
from lorakit import load_model
from lorakit.layers import Linear4bit
from lorakit.models.quantize_checkpoint import quantize_checkpoint
from lorakit.quantization import bnb_format
from lorakit.quantization.policy import QuantConfig

BF16 = 1.01 * unit(torch.bfloat16)  # one side may be rounded to bf16, where the other one is in fp32

bnb = importlib.import_module("bitsandbytes")
peft = importlib.import_module("peft")
transformers = importlib.import_module("transformers")


@pytest.fixture(scope="module")
def aligned_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of whole blocks: of others bitsandbytes' CPU kernel takes wrong scales."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "model_type": "llama"}
    folder = tmp_path_factory.mktemp("aligned")
    return write_checkpoint(folder, small_decoder(**sizes), small_config(**sizes))


@pytest.fixture(scope="module")
def saved_in_4_bits(aligned_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(aligned_checkpoint, quantization_config=config)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("row", rows_of("from-bitsandbytes.md"), ids=str)
def test_from_bitsandbytes(row: Row, aligned_checkpoint: Path, saved_in_4_bits: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(128, 64).requires_grad_(False)
    weight, x = torch.randn(64, 128), torch.randn(3, 128)
    places = {"path": str(aligned_checkpoint), "saved": str(saved_in_4_bits)}
    shared: Names = {"torch": torch, "dense": dense, "weight": weight, "x": x, **places}
    theirs = shared | {"bnb": bnb, "peft": peft, "transformers": transformers, "out": tmp_path / "theirs"}
    ours = shared | {"lorakit": lorakit, "lk": lorakit, "bnb_format": bnb_format, "QuantConfig": QuantConfig}
    ours |= {"quantize_checkpoint": quantize_checkpoint, "out": tmp_path / "ours"}
    for names in (theirs, ours):
        names["parameters"] = [nn.Parameter(weight.clone())]
    run(row, (theirs, ours))
    results = [name for name in RESULTS if name in ours and name not in shared]
    if (tmp_path / "ours").exists():
        theirs["written"], ours["written"] = theirs["out"], ours["out"]
        results = ["written"]
    assert results
    for name in results:
        RESULTS[name](theirs, ours)


def same_quantized(theirs: Names, ours: Names) -> None:
    """The same codes, and the same scales but for the 8-bit codes of scales, where they do not take the nearest."""
    quantized, state = ours["quantized"], theirs["state"]
    if state.quant_type == "fp4":  # which has two codes for zero
        assert torch.equal(bnb.functional.dequantize_4bit(theirs["packed"], state), quantized.dequantize())
    else:
        assert torch.equal(theirs["packed"].view(-1), quantized.packed.view(-1))
    assert (quantized.quant_type, quantized.block_size) == (state.quant_type, state.blocksize)
    assert quantized.double_quant == state.nested
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert_within(scales, quantized.absmax, of_scales(state))
    else:
        assert torch.equal(state.absmax, quantized.absmax)


def of_scales(state: Any) -> float:
    """Return how far a scale may be where the neighbour of the nearest 8-bit code is taken."""
    gaps = state.state2.code.sort().values.diff()
    return float(gaps.max() * state.state2.absmax.max())


def equal_tensors(name: str) -> Callable[[Names, Names], None]:
    def check(theirs: Names, ours: Names) -> None:
        assert torch.equal(theirs[name].view(-1), ours[name].view(-1))

    return check


def same_tensors(theirs: Names, ours: Names) -> None:
    """The same keys and bytes; the state is JSON, whose order is free."""
    their_tensors, our_tensors = theirs["tensors"], ours["tensors"]
    assert their_tensors.keys() == our_tensors.keys()
    for key, tensor in our_tensors.items():
        if key.startswith("quant_state."):
            their_state, our_state = (json.loads(bytes(t.tolist())) for t in (their_tensors[key], tensor))
            assert their_state == our_state
        else:
            assert torch.equal(their_tensors[key], tensor), key


def same_products(theirs: Names, ours: Names) -> None:
    found, expected = theirs["y"], ours["y"]
    assert found.dtype == expected.dtype
    layer, x = ours.get("layer") or Linear4bit(ours["quantized"]), ours["x"]
    bound = 2 * matmul_rounding(x, layer.dense_weight(torch.float32).T, more=4)
    if layer.nested_block_size:  # no value of a code is above 1
        bound = bound + x.abs().sum(-1, keepdim=True) * of_scales(theirs["layer"].weight.quant_state)
    assert_within(found, expected, bound)


def same_models(theirs: Names, ours: Names) -> None:
    """The same modules in 4 bits, of the same values; nothing is trained yet."""
    assert compare_4bit(theirs["model"], ours["model"]) == set(layers_4bit(ours["model"]))
    assert not any(p.requires_grad for p in ours["model"].parameters())
    for path, layer in layers_4bit(ours["model"]).items():
        assert layer.packed.dtype == theirs["model"].get_submodule(path).weight.dtype


def same_folders(theirs: Names, ours: Names) -> None:
    read = transformers.AutoModelForCausalLM.from_pretrained(ours["written"])
    assert len(compare_4bit(read, load_model(theirs["written"]))) == 14
    assert len(compare_4bit(read, load_model(ours["written"]))) == 14


def layers_4bit(model: nn.Module) -> dict[str, Linear4bit]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Linear4bit)}


def compare_4bit(theirs: nn.Module, ours: nn.Module) -> set[str]:
    """Compare all weights; return the paths of the layers that are in 4 bits in theirs."""
    found = set()
    for path, module in theirs.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            values = bnb.functional.dequantize_4bit(module.weight.data, state).float()
            weight = ours.get_submodule(path).dense_weight(torch.float32)
            scales = of_scales(state) if state.nested else 0.0
            assert_within(values, weight, BF16 * weight.abs() + scales)
            found.add(path)
        elif isinstance(getattr(module, "weight", None), Tensor):
            weight = ours.get_submodule(path).weight.float()
            assert_within(module.weight, weight, BF16 * weight.abs())
    return found


def same_steps(theirs: Names, ours: Names) -> None:
    """One step along the same gradient, of nearly the same length; and moments of one byte an element."""
    before = ours["weight"]
    for names in (theirs, ours):
        torch.manual_seed(1)
        names["parameters"][0].grad = torch.randn_like(before)
        names["optimizer"].step()
        moments = [t for t in names["optimizer"].state[names["parameters"][0]].values() if isinstance(t, Tensor)]
        assert sum(t.dtype == torch.uint8 and t.numel() == before.numel() for t in moments) == 2
    steps = [(names["parameters"][0].detach() - before).flatten() for names in (theirs, ours)]
    assert float(torch.cosine_similarity(*steps, dim=0)) > 0.99


RESULTS: dict[str, Callable[[Names, Names], None]] = {
    "quantized": same_quantized,
    "values": equal_tensors("values"),
    "scales": equal_tensors("scales"),
    "codebook": equal_tensors("codebook"),
    "tensors": same_tensors,
    "y": same_products,
    "model": same_models,
    "written": same_folders,
    "optimizer": same_steps,
}
