"""Models, settings and conversations that the tests of probes share."""

from __future__ import annotations

from typing import Any

import torch
from small_models import conversations, small_decoder
from torch import Tensor, nn

from lorakit import Decoder, LoraConfig, TrainConfig, add_adapter
from lorakit.adapters import adapter_parameters
from lorakit.inspection.probes import ProbeConfig
from lorakit.layers import Linear4bit

CONVERSATIONS = conversations(10)
BINS = {"0": [0], "1-2": [1, 2], "3-6": range(3, 7), "7-14": range(7, 15), "15-30": range(15, 31)}
EXACT = 1e-6  # relative, against float64
CLOSE = ProbeConfig(noise_every=1, spectra_every=2, drift_every=3, dead_after=4)


def config(**values: Any) -> TrainConfig:
    given = {"lr": 5e-3, "max_steps": 6, "batch_size": 4, "micro_batch_tokens": 30, "progress": False}
    return TrainConfig(**given | values)


def adapted(quantized: bool = False, **lora: Any) -> Decoder:
    model = small_decoder()
    if quantized:
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and path != "lm_head":
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, Linear4bit.from_linear(module))
    torch.manual_seed(0)
    add_adapter(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.2, **lora}))
    return model


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in adapter_parameters(model)]
