"""Linear4bit multiplies by the dequantized weight, and nothing done to the module changes the weight's bytes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import assert_alike
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from lorakit.errors import ShapeError
from lorakit.layers import Linear4bit
from lorakit.quantization import quantize

TERMS = 128 + 4  # roundings of a product with the largest weight


def layer_4bit(
    out_features: int = 6, in_features: int = 10, bias: bool = True, double_quant: bool = True
) -> Linear4bit:
    torch.manual_seed(0)
    weight = quantize(torch.randn(out_features, in_features), block_size=32, double_quant=double_quant)
    return Linear4bit(weight, torch.randn(out_features) if bias else None)


def weight_bytes(layer: Linear4bit) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (tensor.dtype, tensor.detach().numpy().tobytes())
        for name, tensor in layer.named_parameters()
        if name != "bias"
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        nn.Module.half,
        nn.Module.double,
        nn.Module.bfloat16,
        lambda m: m.half().float(),
        lambda m: m.type(torch.float64),
        nn.Module.eval,
        lambda m: m.eval().train(),
        lambda m: m.requires_grad_(False),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
    ],
    ids=lambda _: None,
)
@pytest.mark.parametrize("double_quant", [True, False])
def test_no_conversion_changes_a_byte(change: Callable[[nn.Module], nn.Module], double_quant: bool) -> None:
    model = nn.Sequential(layer_4bit(double_quant=double_quant))
    before = weight_bytes(model[0])
    x = torch.randn(3, 10)
    expected = model[0].dense_weight(torch.float32)
    changed = change(model)
    assert weight_bytes(changed[0]) == before
    assert torch.equal(changed[0].dense_weight(torch.float32), expected)
    assert changed(x).shape == (3, 6)
    assert not any(parameter.requires_grad for parameter in changed.parameters())


def test_the_bias_is_an_ordinary_tensor() -> None:
    layer = layer_4bit().to(torch.float16)
    assert layer.bias.dtype == torch.float16
    assert layer(torch.randn(2, 10)).dtype == torch.float32  # the result has x's dtype


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_state_dict_carries_the_whole_weight(bias: bool, double_quant: bool, tmp_path: Path) -> None:
    source, target = nn.Sequential(layer_4bit(6, 10, bias, double_quant)), nn.Sequential()
    target.append(Linear4bit(quantize(torch.zeros(6, 10), "nf4", 32, double_quant), torch.zeros(6) if bias else None))
    target.load_state_dict(source.state_dict())
    assert weight_bytes(target[0]) == weight_bytes(source[0])
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).keys() == source.state_dict().keys()


def test_two_layers_share_no_memory_so_that_safetensors_takes_them(tmp_path: Path) -> None:
    model = nn.Sequential(layer_4bit(), layer_4bit(10, 6))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_overwriting_a_layer_leaves_the_codebook_alone() -> None:
    layer = layer_4bit()
    for parameter in layer.parameters():
        parameter.data.zero_()
    weight = torch.linspace(-1, 1, 64)
    assert (quantize(weight).dequantize() - weight).abs().max() < 0.16  # half the codebook's widest step


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(6, 10), (1, 1), (3, 7), (128, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forward_and_backward_are_those_of_the_dense_weight(
    bias: bool, size: tuple[int, int], dtype: torch.dtype
) -> None:
    layer = layer_4bit(*size, bias=bias)
    for shape in [(size[1],), (4, size[1]), (2, 3, size[1]), (0, size[1])]:
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        dy = torch.randn(*shape[:-1], size[0], dtype=dtype)
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, dy)
        dense = layer.dense_weight(dtype)
        expected = linear(x, dense, None if layer.bias is None else layer.bias.to(dtype))
        (expected_dx,) = torch.autograd.grad(expected, x, dy)
        assert torch.equal(y, expected) and y.dtype == dtype
        assert_alike(dx, expected_dx, TERMS)


def test_gradcheck_in_float64() -> None:
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer_4bit().double(), (x,))


def test_nothing_dense_is_kept_for_the_backward_pass() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer_4bit()(torch.randn(3, 10, requires_grad=True))
    assert saved == []


def test_memory_is_what_the_quantized_weight_says() -> None:
    weight = quantize(torch.randn(256, 256))
    layer = Linear4bit(weight)
    tables = layer.code_values.nbytes + layer.nested_code_values.nbytes
    assert sum(parameter.nbytes for parameter in layer.parameters()) == weight.nbytes + tables
    assert layer.quantized.nbytes == weight.nbytes


def test_layers_do_not_spoil_each_other_through_the_workspace() -> None:
    """All layers of a thread dequantize into one buffer; what they returned must not depend on it."""
    layers = [layer_4bit(6, 10), layer_4bit(10, 6), layer_4bit(6, 10, double_quant=False)]
    dense = [layer.dense_weight(torch.float32) for layer in layers]
    for x in (torch.randn(4, 10, requires_grad=True), torch.randn(4, 10, requires_grad=True)):
        first = layers[0](x)
        kept = first.detach().clone()
        layers[1](first).sum().backward()
        layers[2](x)
        assert torch.equal(first, kept)
        expected = (torch.ones(4, 10) @ dense[1]) @ dense[0]
        assert_alike(x.grad, expected, TERMS)


def test_works_in_training_after_inference_mode() -> None:
    with torch.inference_mode():
        layer_4bit(64, 96)(torch.randn(2, 96))
    x = torch.randn(2, 10, requires_grad=True)
    layer_4bit()(x).sum().backward()
    assert x.grad is not None


def test_threads_have_a_workspace_each() -> None:
    layers = [layer_4bit(64, 96), layer_4bit(48, 96)]
    x = torch.randn(5, 96)
    expected = [linear(x, layer.dense_weight(torch.float32), layer.bias) for layer in layers]

    def call(index: int) -> bool:
        return all(torch.equal(layers[index](x), expected[index]) for _ in range(300))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(call, range(2)))


@pytest.mark.parametrize("double_quant", [True, False])
def test_compiles_whole_and_changes_no_byte(double_quant: bool) -> None:
    layer = layer_4bit(double_quant=double_quant)
    before, x = weight_bytes(layer), torch.randn(3, 10, requires_grad=True)
    expected = layer(x)
    (expected_dx,) = torch.autograd.grad(expected.sum(), x)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    (dx,) = torch.autograd.grad(found.sum(), x)
    assert_alike(found, expected, TERMS)
    assert_alike(dx, expected_dx, TERMS)
    assert weight_bytes(layer) == before


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    model = nn.Sequential(layer_4bit(10, 10), nn.SiLU(), layer_4bit())
    before, x = [weight_bytes(model[0]), weight_bytes(model[2])], torch.randn(3, 10, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, expected)
    assert [weight_bytes(model[0]), weight_bytes(model[2])] == before


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ShapeError, match=r"Linear4bit\(10 -> 6\) got x of shape \(2, 9\)"):
        layer_4bit()(torch.randn(2, 9))
    with pytest.raises(ShapeError, match=r"got shape \(10,\)"):
        Linear4bit(quantize(torch.randn(10)))
