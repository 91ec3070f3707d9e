"""Models, settings and conversations that the tests of probes share."""

from __future__ import annotations

from typing import Any

from made import adapted, conversations
from torch import Tensor, nn

from lorakit import Decoder, TrainConfig
from lorakit.adapters import adapter_parameters
from lorakit.inspection.probes import ProbeConfig

CONVERSATIONS = conversations(10)
BINS = {"0": [0], "1-2": [1, 2], "3-6": range(3, 7), "7-14": range(7, 15), "15-30": range(15, 31)}
CLOSE = ProbeConfig(noise_every=1, spectra_every=2, drift_every=3, dead_after=4)


def config(**values: Any) -> TrainConfig:
    given = {"lr": 5e-3, "max_steps": 6, "batch_size": 4, "micro_batch_tokens": 30, "progress": False}
    return TrainConfig(**given | values)


def dropping(quantized: bool = False, **lora: Any) -> Decoder:
    """Return an adapted small decoder whose adapter has dropout."""
    return adapted(quantized=quantized, **{"lora_dropout": 0.2, **lora})


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in adapter_parameters(model)]
