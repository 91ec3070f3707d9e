"""`DecoderConfig`: the shape of a decoder, read from a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...layers.frozen.rope import rope_frequencies
from .families import Family, find_family
from .families.family import sliding_window
from .shape import DecoderShape

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class DecoderConfig(DecoderShape):
    """Sizes and switches of a decoder, and the family whose blocks it is made of."""

    @property
    def family(self) -> Family:
        """Its entry in `FAMILIES`.

        Raises:
            ConfigError: the architecture is not one of them.
        """
        return find_family(self.architecture)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> DecoderConfig:
        """Read the contents of a config.json, of transformers 4 or 5.

        Raises:
            ConfigError: the architecture is not one of `FAMILIES`, a size is missing or does not fit, or a feature that
                this decoder does not have is switched on.
        """
        architecture = str((values.get("architectures") or ["(none)"])[0])
        try:
            family = find_family(architecture)
        except ConfigError as error:
            raise ConfigError(f"config.json: {error}") from None
        try:
            config = DecoderConfig(architecture, **{**_fields(values), **family.switches(values)})
        except KeyError as missing:
            raise ConfigError(f"config.json lacks {missing}, which {architecture} needs") from None
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"config.json: a value has the wrong type: {error}") from None
        _check(config, values)
        return config


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `DecoderShape` as most families name them; "architecture" is left out."""
    rope = values.get("rope_parameters") or {}  # transformers 5 puts theta and scaling together
    heads = int(values["num_attention_heads"])
    attention_bias = bool(values.get("attention_bias", False))
    scaling = values.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
    return {
        "vocab_size": int(values["vocab_size"]),
        "hidden_size": int(values["hidden_size"]),
        "intermediate_size": int(values["intermediate_size"]),
        "num_hidden_layers": int(values["num_hidden_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(values.get("num_key_value_heads") or heads),
        "head_dim": int(values.get("head_dim") or int(values["hidden_size"]) // heads),
        "max_position_embeddings": int(values["max_position_embeddings"]),
        "rms_norm_eps": float(values.get("rms_norm_eps", 1e-6)),
        "rope_theta": float(values.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        "rope_scaling": None if scaling is None else dict(scaling),
        "tie_word_embeddings": bool(values.get("tie_word_embeddings", False)),
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": bool(values.get("mlp_bias", False)),
        "sliding_window": sliding_window(values, by_default=True),
    }


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
    activations = config.family.activations
    if values.get("hidden_act", activations[0]) not in activations:
        known = activations[0]
        raise ConfigError(f"config.json: hidden_act '{values['hidden_act']}' is not supported (known: {known})")
    rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
