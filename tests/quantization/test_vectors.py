"""lorakit against the conformance vectors, on every backend, and the hashes that the format's page gives for them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lorakit_kernels import cpu, dispatch
from safetensors.torch import load_file

from lorakit.quantization import NestedScales, QuantizedWeight, dynamic_map, quantize

VECTORS = Path(__file__).parent.parent / "vectors"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "quantization-format.md"
QUANT_TYPES = ("nf4", "fp4")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
BACKENDS = [  # and what the environment must say of each
    pytest.param({"LORAKIT_BACKEND": "reference"}, id="reference"),
    *(
        pytest.param({"LORAKIT_BACKEND": "cpu", "LORAKIT_CPU_ISA": name}, id=f"cpu-{name}", marks=needs_compiler)
        for name in cpu.instruction_sets()
    ),
]


def cases(quant_type: str) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(VECTORS / f"{quant_type}.safetensors").items():
        case, _, name = key.rpartition(".")
        found.setdefault(case, {})[name] = tensor
    return found


@pytest.mark.parametrize("environment", BACKENDS)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_bytes_and_values_are_those_of_the_vectors(
    quant_type: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    chosen = dispatch.backend(torch.device("cpu"))
    assert chosen.__name__ == f"lorakit_kernels.{environment['LORAKIT_BACKEND']}"  # or nothing would be compared
    assert chosen is not cpu or f"cpu-{environment['LORAKIT_CPU_ISA']}-" in cpu.library()._name
    assert differences(quant_type) == []


@needs_triton
def test_bytes_and_values_are_those_of_the_vectors_on_triton() -> None:
    """In Triton's interpreter, which is chosen before triton is imported and for a whole process."""
    environment = os.environ | {"LORAKIT_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "nf4: []\nfp4: []\n"), result.stderr


def differences(quant_type: str) -> list[str]:
    """What the chosen backend computes otherwise than the vectors say."""
    wrong = []
    for case, expected in cases(quant_type).items():
        block_size = int(case.rpartition(".")[2])
        x = expected["input"]
        if x.dtype == torch.bfloat16 and case.startswith("subnormal") and "TRITON_INTERPRET" in os.environ:
            x = x.float()  # the interpreter reads these as zero, where a GPU moves their bits into place
        plain = quantize(x, quant_type, block_size, double_quant=False)
        nested = quantize(x, quant_type, block_size, double_quant=True)
        assert isinstance(nested.scales, NestedScales)
        found = {
            "packed": plain.packed.reshape(-1),
            "absmax": plain.absmax,
            "values": plain.dequantize(torch.float32).reshape(-1),
            "absmax_codes": nested.scales.codes,
            "nested_absmax": nested.scales.absmax,
            "nested_offset": nested.scales.offset.reshape(1),
            "double_quant_values": nested.dequantize(torch.float32).reshape(-1),
        }
        wrong += [f"{case}: {name}" for name, tensor in found.items() if bits(tensor) != bits(expected[name])]
    return wrong


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


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_dynamic_map_is_the_same_on_every_processor(capability: str) -> None:
    code = "from lorakit.quantization import dynamic_map as m; print([m(s).values.tolist() for s in (True, False)])"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}  # without and with fused multiply-add
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str([dynamic_map(signed).values.tolist() for signed in (True, False)])


def test_making_the_vectors_again_gives_the_same_files(tmp_path: Path) -> None:
    for file in VECTORS.iterdir():
        if file.suffix in (".py", ".safetensors"):
            shutil.copy(file, tmp_path)
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


if __name__ == "__main__":  # of the test on Triton
    for each in QUANT_TYPES:
        print(f"{each}: {differences(each)}")
