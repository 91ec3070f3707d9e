"""What is kept for the backward pass: predicted to the byte, for what hooks see autograd save on real decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from made import ARCHITECTURES, small_config
from planned_adapters import ADAPTERS
from torch import Tensor, nn
from toy_family import CONFIG, TOY

from lorakit import Decoder, LoraConfig, add_adapter
from lorakit.layers import Linear4bit
from lorakit.models import FAMILIES, DecoderConfig
from lorakit.models.decoder.loss import summed_loss
from lorakit.planning.activations import (
    embedding_activations,
    head_activations,
    layer_activations,
    layer_checkpointing,
    rotary_tables,
)
from lorakit.planning.groups import MicroBatch
from lorakit.planning.shape import model_shape
from lorakit.quantization.policy import QuantConfig
from lorakit.training.activations import saving_activations
from lorakit.training.lora_fa import frozen_a

KINDS: list[Any] = ["none", "mlp", "layer", 2, 3]
SEQUENCES, LENGTH, UNTRAINED = 3, 40, 7
TARGETS: list[Any] = [
    {},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["down_proj"]},
    {"target_modules": ["gate_proj", "o_proj"], "layers_to_transform": [1, 3]},
    {"target_modules": ["k_proj", "up_proj"], "rank_pattern": {"k_proj": 3}},
    {"target_modules": ["q_proj", "lm_head"]},
]


def decoder(dtype: torch.dtype, quantized: bool, lora: LoraConfig, **changes: Any) -> Decoder:
    """Return a decoder of four layers, with its adapter, in train mode."""
    model = Decoder(DecoderConfig.from_dict(small_config(**{"num_hidden_layers": 4, **changes}))).to(dtype)
    if quantized:
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, linear in list(part.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(part, name, Linear4bit.from_linear(linear))
    add_adapter(model, lora)
    return model.train()


def kept_tensors(model: Decoder, checkpointing: Any) -> list[int]:
    """Return the bytes of the distinct tensors that autograd saves in a forward pass, parameters left out."""
    ids = torch.randint(model.config.vocab_size, (SEQUENCES * LENGTH,), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1)
    targets[:UNTRAINED] = -100
    kept: dict[int, Tensor] = {}  # by storage, and held, so that no address is used twice
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in own:
            kept[address] = tensor
        return tensor

    with (
        saving_activations(model, checkpointing),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        summed_loss(model, ids, targets, [LENGTH] * SEQUENCES)
    return sorted(tensor.untyped_storage().nbytes() for tensor in kept.values() if tensor.numel() > 1)


def predicted_tensors(
    config: DecoderConfig, dtype: torch.dtype, lora: LoraConfig, checkpointing: Any, lora_fa: bool
) -> list[int]:
    shape = model_shape(config, lora, QuantConfig(quant_type=None), lora_fa)
    trained = SEQUENCES * LENGTH - UNTRAINED
    batch = MicroBatch(SEQUENCES, LENGTH, trained, dtype, lora.lora_dropout > 0, on_cpu=True)
    layers = layer_activations(shape, batch)
    tensors = embedding_activations(shape, batch)
    if any(layer.attends for layer in layers) and checkpointing != "layer":
        tensors += rotary_tables(shape, batch)  # else they are held by the checkpoints' closures, where no hook sees
    for index, layer in enumerate(layers):
        tensors += layer.kept(layer_checkpointing(checkpointing, index))
    return sorted(tensors + head_activations(shape, batch, layers[-1].has_gradient))


@pytest.mark.parametrize("checkpointing", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str, checkpointing: Any) -> None:
    check(torch.bfloat16, True, LoraConfig(r=4), checkpointing, **ARCHITECTURES[name])


@pytest.mark.parametrize("checkpointing", KINDS)
def test_a_family_whose_mlp_has_no_gate(checkpointing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, TOY.architecture, TOY)
    check(torch.float32, False, LoraConfig(r=4), checkpointing, **CONFIG | {"num_hidden_layers": 4})


@pytest.mark.parametrize("checkpointing", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("targets", TARGETS)
def test_every_target(targets: Any, dtype: torch.dtype, checkpointing: Any) -> None:
    check(dtype, True, LoraConfig(r=4, **targets), checkpointing, **ARCHITECTURES["qwen3"])


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("targets", TARGETS[:4])
def test_dropout(targets: Any, dtype: torch.dtype, quantized: bool) -> None:
    check(dtype, quantized, LoraConfig(r=4, lora_dropout=0.1, **targets), "none")


@pytest.mark.parametrize(("dropout", "checkpointing"), [(0.0, "none"), (0.0, "mlp"), (0.1, "none"), (0.1, "layer")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama-biases-tied"])
def test_every_adapter(name: str, adapter: Any, dropout: float, dtype: torch.dtype, checkpointing: Any) -> None:
    lora = LoraConfig(**{"r": 4, "lora_dropout": dropout, **adapter})
    check(dtype, False, lora, checkpointing, **ARCHITECTURES[name])


@pytest.mark.parametrize("checkpointing", ["none", "mlp"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"bias": "all"}, {"init_lora_weights": "olora"}])
@pytest.mark.parametrize("targets", [{}, {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}])
def test_lora_fa(targets: Any, variant: Any, dropout: float, checkpointing: Any) -> None:
    lora = LoraConfig(**{"r": 4, "lora_dropout": dropout, **variant, **targets})
    for name in ("qwen2", "llama"):
        check(torch.bfloat16, not variant.get("init_lora_weights"), lora, checkpointing, True, **ARCHITECTURES[name])


def check(
    dtype: torch.dtype, quantized: bool, lora: LoraConfig, checkpointing: Any, lora_fa: bool = False, **changes: Any
) -> None:
    model = decoder(dtype, quantized, lora, **changes)
    with frozen_a(model, lora_fa):
        seen = kept_tensors(model, checkpointing)
    assert predicted_tensors(model.config, dtype, lora, checkpointing, lora_fa) == seen
