"""The base of every configuration class: strict, immutable once built, with errors that name the nearest right key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ConfigError, did_you_mean
from .other_tools import other_tools_hint


class Settings(BaseModel):
    """A pydantic model that refuses unknown keys and reports every problem at once as a `ConfigError`.

    Raises:
        ConfigError: any key is unknown, missing, of the wrong type or out of range; its `problems` lists them all.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    other_names: ClassVar[Mapping[str, str]] = {}  # name in other programs -> name here, "" where it is not needed

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = _problems(type(self), error)
            listing = "\n".join(f"  {key}: {message}" if key else f"  {message}" for key, message in problems)
            raise ConfigError(f"{type(self).__name__} is not valid:\n{listing}", problems) from None


def _problems(model: type[BaseModel], error: ValidationError) -> list[tuple[str, str]]:
    """Flatten pydantic's errors, nested settings included, to (dotted key, sentence)."""
    problems: list[tuple[str, str]] = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError) and inner.problems:
            problems += [(f"{key}.{name}" if name else key, message) for name, message in inner.problems]
        elif item["type"] == "extra_forbidden":
            problems.append((key, f"unknown key{_hint(str(item['loc'][-1]), model)}"))
        elif item["type"] == "missing":
            problems.append((key, "is required"))
        elif item["type"] == "value_error":
            problems.append((key, str(inner)))
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            problems.append((key, f"{message} (got {item['input']!r})"))
    return problems


def _hint(key: str, model: type[BaseModel]) -> str:
    other = model.other_names if issubclass(model, Settings) else {}
    if key not in other:
        return other_tools_hint(key, model.model_fields) or did_you_mean(key, model.model_fields)
    return f"; here it is called '{other[key]}'" if other[key] else "; it is not needed here, leave it out"
