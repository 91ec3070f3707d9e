"""FLOPs: those of all matrix products that are seen in real forward and backward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from made import ARCHITECTURES, small_config
from planned_adapters import ADAPTERS
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit import Decoder, LoraConfig, add_adapter
from lorakit.models import DecoderConfig
from lorakit.models.decoder.loss import summed_loss
from lorakit.planning.flops import step_flops
from lorakit.planning.groups import MicroBatch
from lorakit.planning.shape import model_shape
from lorakit.quantization.policy import QuantConfig
from lorakit.training.activations import saving_activations
from lorakit.training.lora_fa import frozen_a

SEQUENCES, LENGTH, UNTRAINED = 2, 150, 10  # two blocks of queries

ATEN = torch.ops.aten


class Products(TorchDispatchMode):
    """Adds up the FLOPs of matrix products; torch's own counter does not bear a backward pass within another."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (ATEN.mm, ATEN.bmm):
            self.flops += 2 * result.numel() * args[0].shape[-1]
        elif func.overloadpacket in (ATEN.addmm, ATEN.addmm_, ATEN.baddbmm):
            self.flops += 2 * result.numel() * args[1].shape[-1]
        return result


@pytest.mark.parametrize("checkpointing", ["none", "mlp", "layer", 2])
@pytest.mark.parametrize(
    "targets",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["down_proj"]},
        {"target_modules": ["o_proj", "gate_proj"], "layers_to_transform": [1]},
        {"target_modules": ["k_proj", "lm_head"], "rank_pattern": {"lm_head": 3}},
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_counted(name: str, targets: Any, checkpointing: Any) -> None:
    check(name, LoraConfig(r=4, **targets), checkpointing)


@pytest.mark.parametrize("lora_fa", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", 2])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter(adapter: Any, dropout: float, checkpointing: Any, lora_fa: bool) -> None:
    has_a = adapter.get("target_modules") not in ([], ["embed_tokens"])
    if has_a or not lora_fa:
        check("llama-biases-tied", LoraConfig(**{"r": 4, "lora_dropout": dropout, **adapter}), checkpointing, lora_fa)


def check(name: str, lora: LoraConfig, checkpointing: Any, lora_fa: bool = False) -> None:
    config = DecoderConfig.from_dict(small_config(num_hidden_layers=3, **ARCHITECTURES[name]))
    model = Decoder(config)
    add_adapter(model, lora)
    ids = torch.randint(config.vocab_size, (SEQUENCES * LENGTH,))
    following = ids.roll(-1)
    following[:UNTRAINED] = -100
    counter = Products()
    with saving_activations(model.train(), checkpointing), frozen_a(model, lora_fa), counter:
        summed_loss(model, ids, following, [LENGTH] * SEQUENCES).backward()
    dropout = lora.lora_dropout > 0
    batch = MicroBatch(SEQUENCES, LENGTH, len(ids) - UNTRAINED, torch.float32, dropout, on_cpu=True)
    flops = step_flops(model_shape(config, lora, QuantConfig(quant_type=None), lora_fa), batch, checkpointing)
    assert flops.total == counter.flops
