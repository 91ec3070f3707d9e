"""What the training tests share: an adapted small model, short settings, and what to compare of two runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from made import conversations
from torch import Tensor, nn

from lorakit import Decoder, Tokenizer, TrainConfig, adapter_parameters, train

TIMES = ("seconds", "step_seconds", "peak_rss_mb")
CONVERSATIONS = conversations(10)


def config(**values: Any) -> TrainConfig:
    return TrainConfig(**{"lr": 5e-3, "max_steps": 6, "batch_size": 4, "progress": False, **values})


def values_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in adapter_parameters(model)]


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def interrupted(model: Decoder, tok: Tokenizer, settings: TrainConfig, at_pass: int) -> None:
    """Train until the model's `at_pass`-th forward pass, which is interrupted as Ctrl-C would."""
    passes = iter(range(1, 10_000))

    def interrupt(*_: object) -> None:
        if next(passes) == at_pass:
            raise KeyboardInterrupt

    hook = model.model.norm.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(model, tok, CONVERSATIONS, settings)
    hook.remove()


def update_ratio(kind: type[torch.optim.Optimizer], steps: int, sparsity: float, count: int = 1 << 16) -> float:
    """Return the median over elements of (what the last step moved one by) / (what torch's AdamW moved it by).

    Gradients have lognormal scales, so that each block of a moment holds many magnitudes, as those of a layer do.
    """
    random = torch.Generator().manual_seed(0)
    scale = 1e-4 * torch.exp(2 * torch.randn(count, generator=random))
    parameters = [nn.Parameter(torch.zeros(count)) for _ in range(2)]
    optimizers = [k([p], lr=1e-3, weight_decay=0.0) for k, p in zip((kind, torch.optim.AdamW), parameters, strict=True)]
    for _ in range(steps):
        before = [p.detach().clone() for p in parameters]
        gradient = torch.randn(count, generator=random) * scale
        gradient *= torch.rand(count, generator=random) >= sparsity
        for p, optimizer in zip(parameters, optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    ours, theirs = ((p.detach() - old).abs() for p, old in zip(parameters, before, strict=True))
    return float((ours / theirs)[theirs > 0].median())
