"""The base model's config.json; some consumers' formats depend on the number of layers and of heads."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import CheckpointError
from ...files import read_json_object

_ADVICE = "name the base model's folder with base=..., on the command line with --base"


def read_base_config(source: str | os.PathLike[str] | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the contents of a base model's config.json from its folder; contents are returned as they are.

    Raises:
        CheckpointError: there is no such file, or it is not a JSON object.
    """
    if isinstance(source, Mapping):
        return source
    if source is None:
        raise CheckpointError(f"the adapter does not name its base model; {_ADVICE}")
    file = Path(source) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file.parent}: there is no {file.name} here; {_ADVICE}")
    return read_json_object(file)


def base_size(base: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a positive integer from a config.json, or `default` if it is absent.

    Raises:
        CheckpointError: it has no such number.
    """
    value = base.get(key) or default
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"the base model's config.json has {key} {value!r}, expected a positive number")
    return value


def base_of(model: nn.Module) -> dict[str, Any] | None:
    """Return the contents of config.json for a model in memory, lorakit's or one of transformers; None for others."""
    config: Any = getattr(model, "config", None)
    if callable(getattr(config, "to_dict", None)):
        values: dict[str, Any] = config.to_dict()
        return values | {"architectures": values.get("architectures") or [type(model).__name__]}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        values = dataclasses.asdict(config)
        return values | {"architectures": [values.get("architecture")]}
    return None
