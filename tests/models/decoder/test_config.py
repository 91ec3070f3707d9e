"""config.json as four architectures and two generations of transformers write it, and every way it can be wrong."""

from __future__ import annotations

from typing import Any

import pytest
from made import ARCHITECTURES, small_config

from lorakit.errors import ConfigError
from lorakit.models import DecoderConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def read(**changes: Any) -> DecoderConfig:
    return DecoderConfig.from_dict({k: v for k, v in small_config(**changes).items() if v != "absent"})


def test_sizes_and_their_defaults() -> None:
    config = read(num_key_value_heads="absent", rms_norm_eps="absent", rope_theta="absent")
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (32, 4, 4)
    assert config.head_dim == 8
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 10_000.0)
    assert read(head_dim=16).head_dim == 16
    assert read(head_dim=None).head_dim == 8


@pytest.mark.parametrize(
    ("changes", "switches"),
    [
        (ARCHITECTURES["llama"], set()),
        (ARCHITECTURES["llama-biases-tied"], {"qkv_bias", "output_bias", "mlp_bias", "tie_word_embeddings"}),
        (ARCHITECTURES["mistral"], set()),
        (ARCHITECTURES["qwen2"], {"qkv_bias", "tie_word_embeddings"}),
        (ARCHITECTURES["qwen3"], {"qk_norm"}),
        ({"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, {"qk_norm", "qkv_bias", "output_bias"}),
    ],
)
def test_what_each_architecture_switches_on(changes: dict[str, Any], switches: set[str]) -> None:
    config = read(**changes)
    flags = ("qkv_bias", "output_bias", "mlp_bias", "qk_norm", "tie_word_embeddings")
    assert {flag for flag in flags if getattr(config, flag)} == switches


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": "absent", "rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
    ],
    ids=["transformers 4", "transformers 5"],
)
def test_both_spellings_of_rope(rope: dict[str, Any]) -> None:
    config = read(**rope)
    assert config.rope_theta == 5e5
    assert config.rope_scaling is not None
    assert {key: config.rope_scaling[key] for key in LLAMA3} == LLAMA3
    assert read(rope_parameters={"rope_type": "default", "rope_theta": 9.0}, rope_theta="absent").rope_scaling is None


V5 = {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_theta": 5e5, "rope_parameters": V5}, None),
        ({"rope_theta": 500_000, "rope_parameters": V5, "rope_scaling": None}, None),
        ({"rope_theta": "absent", "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5e5}}, 2.0),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, 2.0),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
            },
            2.0,
        ),
        ({"rope_theta": 5e5, "partial_rotary_factor": 1.0}, None),
    ],
)
def test_places_that_agree(rope: dict[str, Any], scaling: float | None) -> None:
    config = read(**rope)
    assert config.rope_theta == 5e5
    expected = None if scaling is None else {"rope_type": "linear", "factor": scaling}
    assert config.rope_scaling == expected


def test_the_original_context_of_a_scaling() -> None:
    without = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    assert read(rope_scaling=without).rope_scaling == {**without, "original_max_position_embeddings": 1024}
    outside = read(rope_scaling=without, original_max_position_embeddings=512)
    assert outside.rope_scaling == read(rope_scaling=LLAMA3).rope_scaling


@pytest.mark.parametrize(
    ("changes", "window", "context"),
    [
        ({}, None, 1024),
        ({"sliding_window": None}, None, 1024),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 256}, 256, 256),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, 4096, 1024),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 256, "use_sliding_window": False}, None, 1024),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 256}, None, 1024),  # off unless it says otherwise
        ({"architectures": ["Qwen3ForCausalLM"], "sliding_window": 256, "use_sliding_window": True}, 256, 256),
    ],
)
def test_the_sliding_window_limits_the_context(changes: dict[str, Any], window: int | None, context: int) -> None:
    config = read(**changes)
    assert (config.sliding_window, config.context_length) == (window, context)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["LlamaForCasualLM"]},
            "'LlamaForCasualLM' is not supported; did you mean 'LlamaForCausalLM'",
        ),
        ({"architectures": ["GPT2LMHeadModel"]}, r"'GPT2LMHeadModel' is not supported .*\(known: LlamaForCausalLM, "),
        ({"architectures": []}, r"'\(none\)' is not supported"),
        ({"architectures": "absent"}, r"'\(none\)' is not supported"),
        ({"hidden_size": "absent"}, "lacks 'hidden_size', which LlamaForCausalLM needs"),
        ({"max_position_embeddings": "absent"}, "lacks 'max_position_embeddings'"),
        ({"vocab_size": None}, "wrong type"),
        ({"intermediate_size": "wide"}, "wide"),
        ({"num_attention_heads": [4]}, "wrong type"),
        ({"rope_scaling": "linear"}, "config.json"),
        ({"rope_parameters": "default"}, "wrong type"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "rope_scaling of type 'linear'"),
        (
            {"rope_parameters": V5},
            r"rope_theta is 10000.0 and rope_parameters.rope_theta is 500000.0, .* remove the wrong",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5.0}}, "rope_scaling.rope_theta is 5.0"),
        (
            {"rope_theta": "absent", "rope_parameters": V5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_parameters and rope_scaling say different things",
        ),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 9}, "original_max_position_embeddings is 9 and"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        (
            {"rope_theta": "absent", "rope_parameters": {"full_attention": V5, "sliding_attention": V5}},
            "rope_parameters.full_attention: rotations that differ between layers",
        ),
        ({"vocab_size": 0}, "vocab_size is 0, expected at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": -2}, "num_key_value_heads is -2"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"num_key_value_heads": 3}, "4 attention heads do not divide among 3 key/value heads"),
        ({"head_dim": 7}, "head_dim is 7, expected an even number"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**changes)
