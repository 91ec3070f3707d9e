"""The registered operations: choice of the backend, PyTorch's own checks of an operation, torch.compile."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import lorakit_kernels as kernels
import pytest
import torch
from lorakit_kernels import Weight4bit, cpu, dispatch, reference
from tolerances import assert_alike, assert_within, matmul_rounding, unit
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from lorakit.quantization import codebook, dynamic_map

CPU = torch.device("cpu")
ON_CPU = ("reference", "cpu")  # of Triton see test_triton.py
BOOK, TABLE = codebook("nf4"), dynamic_map()


@pytest.fixture(autouse=True)
def no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAKIT_BACKEND", raising=False)


def test_the_device_chooses() -> None:
    assert dispatch.backend(CPU) is (cpu if cpu.is_available() else reference)
    assert dispatch.backend(torch.device("meta")) is reference


def test_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_BACKEND", "reference")
    assert dispatch.backend(CPU) is reference
    with kernels.use_backend("cpu"):  # the nearer one wins
        assert dispatch.backend(CPU) is cpu
        with kernels.use_backend("reference"):
            assert dispatch.backend(CPU) is reference
        assert dispatch.backend(CPU) is cpu
    assert dispatch.backend(CPU) is reference


def test_unknown_backends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend 'cuda' does not exist"), kernels.use_backend("cuda"):
        pass
    monkeypatch.setenv("LORAKIT_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"LORAKIT_BACKEND 'fast' does not exist \(known: reference, cpu, triton\)"):
        kernels.quantize_8bit(torch.randn(8), TABLE.boundaries, 32)


def arguments(columns: int) -> dict[str, tuple[Any, ...]]:
    """Arguments for each operation."""
    x = torch.randn(3, columns)
    packed, absmax = reference.quantize_4bit(x, BOOK.boundaries, BOOK.order, 32)
    codes, scales = reference.quantize_8bit(x, TABLE.boundaries, 32)
    dy, bias, factors = torch.randn(2, 4, 3), torch.randn(3), (torch.randn(2, 4, 5), torch.randn(3, 5))
    weight = Weight4bit(packed, BOOK.values, absmax, 32, (3, columns))
    nested = weight._replace(
        absmax=codes[: len(absmax)], nested=[TABLE.values, scales, torch.tensor(0.5)], nested_block_size=4
    )
    rows = torch.tensor([[2, 0], [1, 2]])
    return {
        "quantize_4bit": (x.bfloat16(), BOOK.boundaries, BOOK.order, 32),
        "quantize_8bit": (x, TABLE.boundaries, 32),
        "dequantize_8bit": (codes, TABLE.values, scales, 32),
        "dequantize_4bit": (weight, torch.bfloat16),
        "dequantize_4bit_out": (weight, torch.empty(3, columns, dtype=torch.float16)),
        "dequantize_4bit nested": (nested, torch.float32),
        "gather_4bit": (weight, rows, torch.float16),
        "gather_4bit nested": (nested, rows[0], torch.float32),
        "linear_4bit": (torch.randn(2, 4, columns), weight, bias, factors, 0.5),
        "linear_4bit plain": (torch.randn(columns), weight, None, [], 1.0),
        "linear_4bit_dx": (dy, weight, (factors[0], torch.randn(5, columns))),
        "linear_4bit_dx plain": (dy.bfloat16(), weight, []),
        "add_linear_4bit_dx": (torch.randn(2, 4, columns), dy, weight),
    }


def flat(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as they are registered: a weight is an argument for each of its fields."""
    fields = (argument if isinstance(argument, Weight4bit) else (argument,) for argument in arguments)
    return tuple(chain(*fields))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("operation", arguments(50))
def test_pytorch_accepts_the_operation(operation: str, backend: str) -> None:
    with kernels.use_backend(backend):
        opcheck(getattr(torch.ops.lorakit, operation.split()[0]).default, flat(arguments(50)[operation]))


@pytest.mark.parametrize("operation", [name for name in arguments(50) if not name.startswith("add_")])
def test_backends_agree(operation: str) -> None:
    results = []
    torch.manual_seed(0)
    fixed = arguments(77)[operation]
    for backend in ON_CPU:
        given = copy.deepcopy(fixed)  # one of them may be written to
        with kernels.use_backend(backend):
            result = getattr(kernels, operation.split()[0])(*given)
        tensors = [given[1]] if result is None else [result] if isinstance(result, Tensor) else list(result)
        results.append(tensors)
    if "linear" in operation:  # a BLAS adds up what each backend cuts its own way: 77 inputs or 3 outputs, 5 ranks
        assert_alike(results[1], results[0], terms=77 + 5 + 3, stores=2)
    else:
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_products_are_those_of_the_values() -> None:
    x, weight, bias, (u, lora_b), scaling = arguments(50)["linear_4bit"]
    values = kernels.dequantize_4bit(weight, torch.float32)
    y = kernels.linear_4bit(x, weight, bias, (u, lora_b), scaling)
    exact = x.double() @ values.double().T + bias + scaling * (u.double() @ lora_b.double().T)
    of_sums = matmul_rounding(x, values.T, more=3) + scaling * matmul_rounding(u, lora_b.T, more=4)
    assert_within(y, exact, of_sums + 3 * unit(torch.float32) * bias.abs())
    dy, lora_a = torch.randn_like(y), torch.randn(5, 50)
    dx = kernels.linear_4bit_dx(dy, weight, (u, lora_a))
    exact = dy.double() @ values.double() + u.double() @ lora_a.double()
    assert_within(dx, exact, matmul_rounding(dy, values, more=3) + matmul_rounding(u, lora_a, more=3))


def round_trip(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    packed, absmax = kernels.quantize_4bit(x, BOOK.boundaries, BOOK.order, 32)
    codes, scales = kernels.quantize_8bit(absmax, TABLE.boundaries, 256)
    absmax = kernels.dequantize_8bit(codes, TABLE.values, scales, 256)
    weight = Weight4bit(packed, BOOK.values, absmax, 32, x.shape)
    kernels.dequantize_4bit_out(weight, out)
    return kernels.dequantize_4bit(weight, torch.bfloat16) * 2, out + 1


def test_compiles_without_graph_breaks_for_dynamic_shapes() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(round_trip, fullgraph=True, dynamic=True, backend=counter)
    for columns in (50, 64, 35):  # more than one block each: sizes of one are special to the compiler
        x, out, expected_out = torch.randn(3, columns), torch.empty(3, columns), torch.empty(3, columns)
        expected = round_trip(x, expected_out)
        found = compiled(x, out)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert torch.equal(out, expected_out)
    assert counter.frame_count == 1


def test_writing_to_out_is_noticed_by_autograd() -> None:
    weight, _ = arguments(50)["dequantize_4bit_out"]
    saved = torch.randn(3, 50)
    product = (torch.randn(3, 50, requires_grad=True) * saved).sum()
    kernels.dequantize_4bit_out(weight, saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_works_in_inference_mode() -> None:
    with torch.inference_mode():
        kernels.dequantize_4bit_out(*arguments(50)["dequantize_4bit_out"])


def test_a_record_is_registered_as_its_fields() -> None:
    names = [argument.name for argument in torch.ops.lorakit.linear_4bit.default._schema.arguments]
    assert names == ["x", *(f"weight_{field}" for field in Weight4bit._fields), "bias", "lora", "scaling"]
    written = [
        argument.name for argument in torch.ops.lorakit.adamw_8bit.default._schema.arguments if argument.is_write
    ]
    assert written == ["parameter", "first_codes", "first_absmax", "second_codes", "second_absmax"]


def test_arguments_with_defaults_may_be_left_out() -> None:
    x, weight, *_ = arguments(50)["linear_4bit"]
    assert torch.equal(kernels.linear_4bit(x, weight), kernels.linear_4bit(x, weight, None, [], 1.0))
    with torch.inference_mode():
        assert torch.equal(kernels.linear_4bit(x, weight), kernels.linear_4bit(x, weight, None, [], 1.0))


def test_arguments_may_have_their_names() -> None:
    x, weight, bias, *_ = arguments(50)["linear_4bit"]
    expected = kernels.linear_4bit(x, weight, bias, [], 1.0)
    assert torch.equal(kernels.linear_4bit(x, weight, bias=bias), expected)
    with torch.inference_mode():
        assert torch.equal(kernels.linear_4bit(bias=bias, weight=weight, x=x), expected)
    named = torch.compile(lambda x: kernels.linear_4bit(x, weight, bias=bias), backend="aot_eager", fullgraph=True)
    assert torch.equal(named(x), expected)


def test_a_wrong_number_of_arguments_is_named() -> None:
    x, seed = torch.randn(3), torch.tensor(1)
    with pytest.raises(TypeError, match="missing a required argument: 'seed'"):
        kernels.drop(x)
    with pytest.raises(TypeError, match="too many positional arguments"):
        kernels.drop(x, seed, 0.5, 1)


def test_the_reference_backend_is_every_definition_but_that_of_the_allocation() -> None:
    operations = {name: getattr(kernels, name) for name in kernels.__all__}
    definitions = {name: each.definition for name, each in operations.items() if hasattr(each, "definition")}
    del definitions["dequantize_4bit"]  # allocates, and has the backend fill
    assert {name: getattr(reference, name, None) for name in definitions} == definitions
