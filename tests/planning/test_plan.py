"""`plan` as callers see it: parts, limits, suggestions, costs."""

from __future__ import annotations

from typing import Any

import pytest
from made import ARCHITECTURES, small_config
from planned_adapters import ADAPTERS

from lorakit import Decoder, LoraConfig, TrainConfig, add_adapter, plan
from lorakit.errors import AdapterError, ConfigError
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


@pytest.mark.parametrize("adapter", [{}, *ADAPTERS])
@pytest.mark.parametrize("name", ["llama-biases-tied", "qwen2", "llama"])
def test_parameters_are_those_that_add_adapter_reports(name: str, adapter: dict[str, Any]) -> None:
    lora = LoraConfig(**{"r": 4, **adapter})
    config = DecoderConfig.from_dict(small_config(**ARCHITECTURES[name]))
    made = plan(config, lora, quant_type=None, sequence_length=64)
    model = Decoder(config)
    report = add_adapter(model, lora)
    assert (made.trainable, made.parameters + made.adapter_parameters) == (report.trainable, report.total)
    # A step's optimizer holds two moments and a count of steps for each trained parameter, no more.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert made.parts["optimizer"] == sum(8 * parameter.numel() + 4 for parameter in trained)


def test_lora_fa_spares_gradients_and_moments_of_a() -> None:
    frozen = TRAIN.model_copy(update={"lora_fa": True})
    both, half = (plan(SHAPE, LoraConfig(r=8), train, sequence_length=512) for train in (TRAIN, frozen))
    of_a = 4 * 8 * (6 * SHAPE.hidden_size + SHAPE.intermediate_size)  # of all layers: six read the stream, down not
    assert both.trainable - half.trainable == of_a and both.adapter_parameters == half.adapter_parameters
    assert both.parts["adapters"] == half.parts["adapters"]
    assert both.parts["optimizer"] - half.parts["optimizer"] == 8 * of_a + 4 * 28
    with pytest.raises(ConfigError, match="lora_fa freezes lora_A, but the adapter has none"):
        plan(SHAPE, LoraConfig(r=8, target_modules=["embed_tokens"]), frozen, sequence_length=512)


def test_offloaded_activations_leave_the_gpu() -> None:
    offloaded = TRAIN.model_copy(update={"offload_activations": True})
    stays, goes = (plan(SHAPE, None, train, sequence_length=512, device="cuda") for train in (TRAIN, offloaded))
    assert goes.parts["activations"] < stays.parts["activations"] / 2 and goes.flops == stays.flops
    assert not stays.notes and "host memory" in goes.notes[0]
    with pytest.raises(ConfigError, match="offload_activations relieves a GPU"):
        plan(SHAPE, None, offloaded, sequence_length=512)


@pytest.mark.parametrize("start", ["pissa_niter_4", "milora", "olora", "loftq", "eva", "lora_ga"])
def test_what_a_start_takes_is_said_not_to_be_counted(start: str) -> None:
    (note,) = plan(SHAPE, LoraConfig(r=8, init_lora_weights=start), TRAIN, sequence_length=512).notes
    assert start in note and "before the first step" in note


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        ({"target_parameters": ["q_proj.weight"]}, ConfigError, "target_parameters cannot be planned"),
        (
            {"modules_to_save": ["mlp"]},
            ConfigError,
            r"layers.0.mlp of modules_to_save is a MLP, which cannot be planned",
        ),
        ({"modules_to_save": ["down_proj"]}, AdapterError, r"layers.0.mlp.down_proj, .* in 4 bits"),
        ({"target_modules": ["q_porj"]}, AdapterError, "did you mean 'q_proj'"),
        ({"rank_pattern": {"k_porj": 2}}, AdapterError, "no adapted layer matches the pattern 'k_porj'"),
    ],
)
def test_what_cannot_be_planned_is_refused(adapter: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan(SHAPE, LoraConfig(**adapter), TRAIN, sequence_length=512)


def test_a_model_with_trained_weights_is_not_told_to_quantize_them() -> None:
    saved = LoraConfig(r=8, modules_to_save=["down_proj"], target_modules=["q_proj"])
    whole = plan(SHAPE, saved, TRAIN, quant_type=None, sequence_length=512)
    tight = plan(SHAPE, saved, TRAIN, quant_type=None, sequence_length=512, memory=whole.peak_bytes - 10 * MIB)
    assert tight.suggestions and not any("quant_type" in one.changes for one in tight.suggestions)
