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
    heads = int(values["num_attention_heads"])
    attention_bias = bool(values.get("attention_bias", False))
    theta, scaling = _rope(values)
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
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": bool(values.get("tie_word_embeddings", False)),
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": bool(values.get("mlp_bias", False)),
        "sliding_window": sliding_window(values, by_default=True),
    }


def _rope(values: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return theta and the scaling, None for no scaling.

    transformers 4 writes rope_theta and rope_scaling, transformers 5 puts both into rope_parameters. Where a file has
    several places, programs differ in which one they read, so the places must agree.

    Raises:
        ConfigError: two places disagree, layers differ from each other, or a part of each head is not rotated.
    """
    tables = {key: dict(values[key]) for key in ("rope_parameters", "rope_scaling") if values.get(key)}
    places = {"": values, **{f"{key}.": table for key, table in tables.items()}}
    theta = _agreed("rope_theta", places) or 10_000.0
    if (_agreed("partial_rotary_factor", places) or 1.0) != 1.0:
        raise ConfigError(
            "config.json: partial_rotary_factor is not 1; heads that are rotated in part are not supported"
        )
    original = _agreed("original_max_position_embeddings", places)
    for key, table in tables.items():
        if nested := [name for name, value in table.items() if isinstance(value, Mapping)]:
            raise ConfigError(f"config.json: {key}.{nested[0]}: rotations that differ between layers are not supported")
        kind = table.pop("rope_type", None) or table.pop("type", None) or "default"
        shared = ("type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
        table = {name: value for name, value in table.items() if name not in shared}
        if kind == "llama3":
            table["original_max_position_embeddings"] = original or values["max_position_embeddings"]
        tables[key] = {} if kind == "default" else {"rope_type": kind, **table}
    if len(tables) == 2 and tables["rope_parameters"] != tables["rope_scaling"]:
        raise ConfigError("config.json: rope_parameters and rope_scaling say different things; remove one of them")
    return float(theta), next(iter(tables.values()), None) or None


def _agreed(key: str, places: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return the one value that a key has in several places, as prefix -> mapping; None if it is in none of them."""
    found = {f"{place}{key}": value for place, table in places.items() if (value := table.get(key)) is not None}
    names = list(found)
    if other := next((name for name in names[1:] if found[name] != found[names[0]]), None):
        raise ConfigError(
            f"config.json: {names[0]} is {found[names[0]]} and {other} is {found[other]}, and programs differ in which "
            "they read; remove the wrong one"
        )
    return found[names[0]] if found else None


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
