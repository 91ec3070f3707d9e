"""`DecoderConfig`: what a checkpoint's config.json says about the shape of a Llama-family decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, did_you_mean
from ..layers.rope import rope_frequencies

# What the architectures differ in, where config.json does not say it itself.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True, "use_sliding_window": False},
    "Qwen3ForCausalLM": {"qk_norm": True, "use_sliding_window": False},
}

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder; field names follow Hugging Face's config.json where it has them."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each head's query and key, as in Qwen3
    sliding_window: int | None = None

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence: those of the sliding window where there is one, which nothing may leave."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> DecoderConfig:
        """Read the contents of a config.json, of transformers 4 or 5.

        Raises:
            ConfigError: the architecture is not one of `ARCHITECTURES`, a size is missing or does not fit, or a feature
                is switched on that this decoder does not have.
        """
        names = values.get("architectures") or ["(none)"]
        architecture = str(names[0])
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            near = did_you_mean(architecture, ARCHITECTURES)
            raise ConfigError(f"config.json: architecture '{architecture}' is not supported{near} (known: {known})")
        try:
            config = _build(architecture, values)
        except KeyError as missing:
            raise ConfigError(f"config.json lacks {missing}, which {architecture} needs") from None
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"config.json: a value has the wrong type: {error}") from None
        _check(config, values)
        return config


def _build(architecture: str, values: Mapping[str, Any]) -> DecoderConfig:
    switches = ARCHITECTURES[architecture]
    rope = values.get("rope_parameters") or {}  # transformers 5 puts theta and scaling together
    heads = int(values["num_attention_heads"])
    attention_bias = bool(values.get("attention_bias", False))
    slides = values.get("use_sliding_window", switches.get("use_sliding_window", True))
    sliding = values.get("sliding_window") if slides else None
    scaling = values.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=int(values["vocab_size"]),
        hidden_size=int(values["hidden_size"]),
        intermediate_size=int(values["intermediate_size"]),
        num_hidden_layers=int(values["num_hidden_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=int(values.get("num_key_value_heads") or heads),
        head_dim=int(values.get("head_dim") or int(values["hidden_size"]) // heads),
        max_position_embeddings=int(values["max_position_embeddings"]),
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        rope_theta=float(values.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        rope_scaling=None if scaling is None else dict(scaling),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=bool(switches.get("qkv_bias", attention_bias)),
        output_bias=attention_bias and "qkv_bias" not in switches,
        mlp_bias=bool(values.get("mlp_bias", False)),
        qk_norm=bool(switches.get("qk_norm", False)),
        sliding_window=None if sliding is None else int(sliding),
    )


def _check(config: DecoderConfig, values: Mapping[str, Any]) -> None:
    for name in _SIZES:
        if getattr(config, name) < 1:
            raise ConfigError(f"config.json: {name} is {getattr(config, name)}, expected at least 1")
    if config.head_dim % 2:
        raise ConfigError(f"config.json: head_dim is {config.head_dim}, expected an even number for rotary positions")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"config.json: {config.num_attention_heads} attention heads do not divide among "
            f"{config.num_key_value_heads} key/value heads"
        )
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"config.json: hidden_act '{values['hidden_act']}' is not supported (known: silu)")
    rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
