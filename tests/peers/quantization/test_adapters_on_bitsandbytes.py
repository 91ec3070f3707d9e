"""Adapters on bitsandbytes' own layers: put in by hand, or by transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from tolerances import assert_alike, assert_within, rounding
from torch import Tensor, nn
from torch.nn.functional import linear

from lorakit import (
    LoraConfig,
    adapter_parameters,
    add_adapter,
    disable_adapters,
    load_adapter,
    merge_adapter,
    save_adapter,
    unmerge_adapter,
    use_rows,
)
from lorakit.errors import AdapterError
from lorakit.layers import AdaptedLayer, ResidualLinear4bit
from lorakit.layers.frozen.values import bitsandbytes_4bit, values_of

TERMS = 512  # roundings of a layer with 128 inputs, of rank 4 and of the norms of DoRA
X = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(0))
VARIANTS: list[dict[str, Any]] = [
    {}, {"use_dora": True}, {"variant": "hira"}, {"init_lora_weights": "pissa"}, {"lora_bias": True}
]  # fmt: skip


def dense(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 64, bias=bias)


def four_bit(bias: bool = True, **settings: Any) -> nn.Module:
    layer = bnb.nn.Linear4bit(128, 64, bias, torch.float32, **{"quant_type": "nf4", **settings})
    layer.load_state_dict(dense(bias).state_dict())
    return layer.to("cpu")


def eight_bit(bias: bool = True) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(128, 64, bias, has_fp16_weights=False)
    layer.load_state_dict(dense(bias).state_dict())
    return layer.to("cpu")


def adapted(layer: nn.Module, **settings: Any) -> nn.Sequential:
    model = nn.Sequential(layer).requires_grad_(False)
    torch.manual_seed(2)
    add_adapter(model, LoraConfig(r=4, target_modules=["0"], **settings))
    for parameter in adapter_parameters(model):
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def product(model: nn.Sequential, x: Tensor) -> Tensor:
    """Return x times the dense adapted weight."""
    layer = model[0]
    assert isinstance(layer, AdaptedLayer)
    bias, offset = layer.base_bias, layer.delta_bias("default")
    total = offset if bias is None else bias if offset is None else bias + offset
    return linear(x, layer.base_weight(torch.float32) + layer.delta_weight("default"), total)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@torch.no_grad()
def test_values_are_those_of_the_codes(quant_type: str, nested: bool, storage: torch.dtype) -> None:
    layer = four_bit(quant_type=quant_type, compress_statistics=nested, quant_storage=storage).eval()
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    assert torch.equal(values_of(layer, torch.float32), expected)
    assert torch.equal(values_of(layer, torch.float32, slice(3, 9)), expected[3:9])
    before = bitsandbytes_4bit(layer).codes.clone()
    layer(X)  # on some processors, bitsandbytes now rearranges the codes and rounds the scales to bf16
    assert torch.equal(bitsandbytes_4bit(layer).codes, before)
    assert_within(values_of(layer, torch.float32), expected, rounding(1, expected.abs(), torch.bfloat16))


@torch.no_grad()
def test_values_of_eight_bits() -> None:
    layer = eight_bit().eval()
    expected = bnb.functional.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
    for _ in range(2):  # the first forward moves the scales
        assert_within(values_of(layer, torch.float32), expected, rounding(3, expected.abs()))
        layer(X)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_four_bits_by_hand_train_and_merge(bias: bool, settings: dict[str, Any]) -> None:
    if settings.get("lora_bias") and not bias:
        settings = {}
    model = adapted(four_bit(bias), **settings).train()
    x = X.clone().requires_grad_()
    found, expected = model(x), product(model, x)
    assert_alike(found, expected, TERMS)
    pulled, wanted = (torch.autograd.grad(y.square().sum(), [x, *adapter_parameters(model)]) for y in (found, expected))
    assert_alike(pulled, wanted, 64 * TERMS)
    merge_adapter(model, base=False)
    assert type(model[0]) is nn.Linear
    assert_alike(model(X), expected.detach(), TERMS)
    unmerge_adapter(model)
    assert type(model[0].base_layer) is bnb.nn.Linear4bit
    if settings.keys() & {
        "variant",
        "use_dora",
    }:  # one cannot stay in 4 bits, the other rounds its gain into the scales
        return
    merge_adapter(model, quantize=True, base=False)
    assert type(model[0]) is ResidualLinear4bit
    assert_alike(model(X), expected.detach(), 2 * TERMS)


def test_evaluation_before_training_loses_no_gradient() -> None:
    """On some processors the kernel of bitsandbytes for evaluation has no gradient and says nothing about it."""
    for bias in (True, False):
        model = nn.Sequential(nn.Linear(128, 128), four_bit(bias)).requires_grad_(False)
        add_adapter(model, LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False))
        with torch.no_grad():
            model.eval()(X)
        model.train()(X).square().sum().backward()
        weight = model[1].base_weight(torch.float32) + model[1].delta_weight("default")
        found = [parameter.grad for parameter in model[0].parameters_of("default").values()]
        y = linear(model[0](X), weight, model[1].base_bias)
        expected = torch.autograd.grad(y.square().sum(), list(model[0].parameters_of("default").values()))
        assert_alike(found, expected, 64 * TERMS)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_eight_bits_keep_their_product(settings: dict[str, Any]) -> None:
    model = adapted(eight_bit(), **settings)
    with disable_adapters(model):
        alone = model(X)
    layer = model[0]
    added = X @ layer.delta_weight("default").T
    offset = layer.delta_bias("default")
    # DoRA multiplies bitsandbytes' product, whose input is in 8 bits too.
    bound = rounding(TERMS, (X.abs() @ layer.base_weight(torch.float32).abs().T).max())
    bound = bound if "use_dora" not in settings else alone.abs().max() / 127
    assert_within(model(X), alone + added + (0 if offset is None else offset), bound)
    model(X.clone().requires_grad_()).sum().backward()
    assert all(parameter.grad.any() for parameter in adapter_parameters(model))
    merge_adapter(model, base=False)
    assert type(model[0]) is nn.Linear
    unmerge_adapter(model)
    assert type(model[0].base_layer) is bnb.nn.Linear8bitLt


def test_rows_and_hooks_on_four_bits() -> None:
    model = adapted(four_bit()).train()
    model[0].base_layer.register_forward_hook(lambda module, inputs, output: output + 10)
    with disable_adapters(model):
        alone = model(X)
    with use_rows(model, ["default", "__base__"] * 2):
        assert_alike(model(X)[::2], product(model, X)[::2] + 10, TERMS)
        assert_alike(model(X)[1::2], alone[1::2], TERMS)
    merge_adapter(model, base=False)
    assert_alike(model(X), product_after(model), TERMS)


def product_after(model: nn.Sequential) -> Tensor:
    """Return what the merged layer gives, with the hook's part."""
    return linear(X, model[0].weight, model[0].bias) + 10


def test_codes_are_no_weights() -> None:
    for layer, name in ((four_bit(), "Linear4bit"), (eight_bit(), "Linear8bitLt")):
        model = adapted(copy.deepcopy(layer))
        assert model[0].weight.dtype in (torch.uint8, torch.int8)  # as models ask that guard against 8 bits
        with pytest.raises(AdapterError, match=rf"0, a {name}: the model takes its weight, to whose codes"):
            linear(X, model[0].weight)
        for settings in ({"modules_to_save": ["0"]}, {"target_parameters": ["0.weight"]}):
            fresh = nn.Sequential(copy.deepcopy(layer))
            with pytest.raises(AdapterError, match="quantized"):
                add_adapter(fresh, LoraConfig(target_modules=[], **settings))
            assert type(fresh[0]) is type(layer)


def with_dense_bases(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose adapted layers have dense base layers with the same values."""
    exact = copy.deepcopy(model)
    for layer in exact.modules():
        if isinstance(layer, AdaptedLayer):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.base_bias is not None).requires_grad_(False)
            plain.weight.data, plain.bias = layer.base_weight(torch.float32), layer.base_layer.bias
            layer.base_layer = plain
    return exact


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_model(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tf.Qwen3Config(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=128,
    )  # fmt: skip
    tf.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "base")
    kind = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {"load_in_8bit": True}
    quantization = tf.BitsAndBytesConfig(**kind)

    def load() -> nn.Module:
        model: nn.Module = tf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantization, dtype=torch.float32
        )
        return model

    model = load().train()
    add_adapter(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    exact = with_dense_bases(model)
    for one in (model, exact):
        one(input_ids=IDS, labels=IDS).loss.backward()
    found, expected = (torch.cat([p.grad.flatten() for p in adapter_parameters(one)]) for one in (model, exact))
    assert (found - expected).norm() < expected.norm() / 32  # bitsandbytes multiplies with less than fp32
    save_adapter(model, tmp_path / "adapter")
    other = load().eval()
    load_adapter(other, tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        assert torch.equal(other(input_ids=IDS).logits, expected)
        merge_adapter(model, base=False)
        assert (model(input_ids=IDS).logits - expected).norm() < expected.norm() / 32
        unmerge_adapter(model)
        assert torch.equal(model(input_ids=IDS).logits, expected)
