"""`plan` as callers see it: parts, limits, suggestions, costs."""

from __future__ import annotations

import pytest

from lorakit import LoraConfig, TrainConfig, plan
from lorakit.errors import ConfigError
from lorakit.models import DecoderConfig

SHAPE = DecoderConfig("LlamaForCausalLM", 4096, 256, 512, 4, 8, 4, 32, 2048)
TRAIN = TrainConfig(batch_size=8, micro_batch_tokens=4096)
MIB = 1 << 20


def test_the_peak_is_the_sum_of_its_parts_and_suggestions_stay_within_the_limit() -> None:
    whole = plan(SHAPE, LoraConfig(r=8), TRAIN, sequence_length=512)
    assert whole.peak_bytes == sum(whole.parts.values()) and whole.suggestions == ()
    limit = whole.peak_bytes - 20 * MIB
    tight = plan(SHAPE, LoraConfig(r=8), TRAIN, sequence_length=512, memory=limit)
    assert tight.parts == whole.parts and not tight.fits(limit) and tight.suggestions
    for suggestion in tight.suggestions:
        assert suggestion.peak_bytes <= limit
        changed = TrainConfig(**{**TRAIN.model_dump(), **suggestion.changes})
        again = plan(SHAPE, LoraConfig(r=8), changed, sequence_length=512)
        assert again.peak_bytes == suggestion.peak_bytes and again.flops == suggestion.flops


def test_what_cannot_fit_is_refused_with_the_least_that_can_be_reached() -> None:
    with pytest.raises(ConfigError, match=r"nothing fits 10 MiB at 512 tokens .* the least is .*checkpointing=layer"):
        plan(SHAPE, LoraConfig(r=8), TRAIN, sequence_length=512, memory="10MiB")


def test_the_state_of_an_offloaded_optimizer_is_not_on_the_gpu() -> None:
    offloaded = TRAIN.model_copy(update={"offload_optimizer": True})
    for device in ("cuda", "cpu"):
        stays = plan(SHAPE, LoraConfig(r=8), TRAIN, sequence_length=512, device=device)
        goes = plan(SHAPE, LoraConfig(r=8), offloaded, sequence_length=512, device=device)
        state = 8 * stays.trainable  # two fp32 moments, and the count of steps of each matrix
        assert 0 <= stays.parts["optimizer"] - state < 1024
        saved = stays.parts["optimizer"] if device == "cuda" else 0  # the CPU's memory is where it would go
        assert stays.peak_bytes - goes.peak_bytes == saved


def test_cost_is_arithmetic_on_the_step() -> None:
    made = plan(
        SHAPE, LoraConfig(r=8), TRAIN, sequence_length=512,
        dataset_tokens=40_960, flops_per_second=1e12, price_per_hour=3.6,
    )  # fmt: skip
    assert made.step_tokens == 4096 and made.cost is not None
    assert made.cost.tokens == 40_960 * TRAIN.epochs
    assert made.cost.flops == pytest.approx(10 * TRAIN.epochs * made.flops.total)
    assert made.cost.seconds == pytest.approx(made.cost.flops / 1e12)
    assert made.cost.price == pytest.approx(made.cost.seconds * 1e-3)
