"""FLOPs: those that torch counts in real forward and backward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import ARCHITECTURES, small_config
from torch.utils.flop_counter import FlopCounterMode

from lorakit import Decoder, LoraConfig, add_adapter
from lorakit.models import DecoderConfig
from lorakit.models.loss import summed_loss
from lorakit.planning.activations import MicroBatch
from lorakit.planning.flops import step_flops
from lorakit.planning.shape import model_shape
from lorakit.quantization.policy import QuantConfig
from lorakit.training.activations import saving_activations

SEQUENCES, LENGTH, UNTRAINED = 2, 150, 10  # two blocks of queries


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
    config = DecoderConfig.from_dict(small_config(num_hidden_layers=3, **ARCHITECTURES[name]))
    lora = LoraConfig(r=4, **targets)
    model = Decoder(config)
    add_adapter(model, lora)
    ids = torch.randint(config.vocab_size, (SEQUENCES * LENGTH,))
    following = ids.roll(-1)
    following[:UNTRAINED] = -100
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})  # torch leaves it out
    with saving_activations(model.train(), checkpointing), counter:
        summed_loss(model, ids, following, [LENGTH] * SEQUENCES).backward()
    batch = MicroBatch(SEQUENCES, LENGTH, len(ids) - UNTRAINED, torch.float32, dropout=False, on_cpu=True)
    flops = step_flops(model_shape(config, lora, QuantConfig(quant_type=None)), batch, checkpointing)
    assert flops.total == counter.get_total_flops()


def product(result: torch.Size, a: torch.Size, b: torch.Size, **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]
