"""lorakit against the conformance vectors, on every backend, and the hashes that the format's page gives for them."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import lorakit_kernels as kernels
import pytest
import torch
from safetensors.torch import load_file

from lorakit.quantization import NestedScales, QuantizedWeight, dynamic_map, quantize

VECTORS = Path(__file__).parent.parent / "vectors"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "quantization-format.md"
ON_CPU = ("reference", "cpu")  # of Triton see tests/kernels/test_triton.py


def cases(quant_type: str) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(VECTORS / f"{quant_type}.safetensors").items():
        case, _, name = key.rpartition(".")
        found.setdefault(case, {})[name] = tensor
    return found


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bytes_and_values_are_those_of_the_vectors(quant_type: str, backend: str) -> None:
    for case, expected in cases(quant_type).items():
        block_size = int(case.rpartition(".")[2])
        with kernels.use_backend(backend):
            plain = quantize(expected["input"], quant_type, block_size, double_quant=False)
            nested = quantize(expected["input"], quant_type, block_size, double_quant=True)
            values, nested_values = plain.dequantize(torch.float32), nested.dequantize(torch.float32)
        assert isinstance(nested.scales, NestedScales)
        found = {
            "packed": plain.packed.reshape(-1),
            "absmax": plain.absmax,
            "values": values.reshape(-1),
            "absmax_codes": nested.scales.codes,
            "nested_absmax": nested.scales.absmax,
            "nested_offset": nested.scales.offset.reshape(1),
            "double_quant_values": nested_values.reshape(-1),
        }
        for name, tensor in found.items():
            assert bits(tensor) == bits(expected[name]), f"{case}: {name}"


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, so that -0.0 differs from 0.0."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_the_vectors_hold_every_kind_of_case() -> None:
    names = list(cases("nf4"))
    assert {name.split(".")[0] for name in names} == {"matrix", "odd", "ties", "zeros", "subnormal", "cube", "empty"}
    assert {name.split(".")[1] for name in names} == {"fp32", "bf16", "fp16"}
    assert {int(name.split(".")[2]) for name in names} == {32, 64, 128, 256, 512, 1024, 2048, 4096}


def test_the_page_gives_the_hashes_of_the_vectors_and_of_the_dynamic_map() -> None:
    page = PAGE.read_text(encoding="utf-8")
    hashes = dict(re.findall(r"`([\w.]+)`[^`]*`([0-9a-f]{64})`", page))
    for file in sorted(VECTORS.glob("*.safetensors")):
        assert hashes[file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert hashes["dynamic_map"] == hashlib.sha256(dynamic_map().values.numpy().tobytes()).hexdigest()


def test_making_the_vectors_again_gives_the_same_files(tmp_path: Path) -> None:
    script = (VECTORS / "make.py").read_text(encoding="utf-8")
    (tmp_path / "make.py").write_text(script, encoding="utf-8")
    subprocess.run([sys.executable, str(tmp_path / "make.py")], check=True)
    for file in sorted(VECTORS.glob("*.safetensors")):
        again, stored = load_file(tmp_path / file.name), load_file(file)
        assert set(again) == set(stored)
        assert all(bits(again[key]) == bits(stored[key]) for key in stored)


def test_a_weight_put_together_from_stored_parts_gives_the_values() -> None:
    """The reading half alone, as a file gives it: nothing is quantized here."""
    expected = cases("nf4")["matrix.bf16.64"]
    scales = NestedScales(
        expected["absmax_codes"], expected["nested_absmax"], expected["nested_offset"][0], dynamic_map().values
    )
    made = quantize(expected["input"])
    weight = QuantizedWeight(
        expected["packed"], scales, expected["input"].shape, torch.bfloat16, "nf4", 64, made.code_values
    )
    assert bits(weight.dequantize(torch.float32).reshape(-1)) == bits(expected["double_quant_values"])
