"""The time of a step's products with the frozen weights alone: the least that a step can take on a machine."""

from __future__ import annotations

from collections import Counter

import torch

from bench.harness.timing import medians
from lorakit import Decoder, Linear4bit


def product_shapes(model: Decoder) -> Counter[tuple[int, int]]:
    """Return (out_features, in_features) -> number of frozen linear layers of a model, the head included."""
    layers = (module for module in model.modules() if isinstance(module, torch.nn.Linear | Linear4bit))
    return Counter((layer.out_features, layer.in_features) for layer in layers)


def product_seconds(model: Decoder, tokens: int, forward_passes: int, rounds: int = 3) -> float:
    """Return the seconds of `forward_passes` times x Wᵀ plus dy W, over all frozen weights, in dense bf16.

    One weight stands for all of its shape. The adapters' products, a few percent of these, are left out.
    """
    total = 0.0
    for (out_features, in_features), count in product_shapes(model).items():
        weight = torch.randn(out_features, in_features).bfloat16()
        x, dy = (torch.randn(tokens, features).bfloat16() for features in (in_features, out_features))
        calls = {"forward": lambda x=x, w=weight: x @ w.T, "backward": lambda dy=dy, w=weight: dy @ w}
        seen = medians(calls, rounds)
        total += count * (forward_passes * seen["forward"] + seen["backward"])
    return total
