"""Which modules are quantized, and how: data that a recipe, a test or a config file can hold.

A pattern matches a module by its name, by a dotted suffix of its name, or as a regular expression on either:
"down_proj", "layers.0.mlp.down_proj" and "layers\\.[0-3]\\..*" are all patterns. A pattern without effect is an error:
otherwise a misspelled exception would only show by its cost.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ..errors import ConfigError, did_you_mean
from ..settings import Settings
from .codebooks import check_quant_type
from .weight import check_block_size

DEFAULT_SKIP = ("lm_head",)


@dataclass(frozen=True)
class WeightFormat:
    """How one weight is quantized: the arguments of `lorakit.quantize`."""

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True


class _Checked(Settings):
    """The checks that `QuantConfig` and `Override` share."""

    @field_validator("quant_type", check_fields=False)
    @classmethod
    def _quant_type_exists(cls, value: str | None) -> str | None:
        if value is not None:
            check_quant_type(value)
        return value

    @field_validator("block_size", check_fields=False)
    @classmethod
    def _block_size_exists(cls, value: int | None) -> int | None:
        if value is not None:
            check_block_size(value)
        return value

    @field_validator("skip", "overrides", check_fields=False)
    @classmethod
    def _are_expressions(cls, value: object) -> object:
        for pattern in value if isinstance(value, tuple | dict) else ():
            _compiled(pattern)
        return value


class Override(_Checked):
    """The settings that differ for the modules that one pattern matches. None means: as for all others.

    Attributes:
        quant_type: a name in `QUANT_TYPES`, such as "nf4".
        block_size: elements that share a scale.
        double_quant: whether the scales are stored in 8 bits.
        skip: leave these modules in 16 bits.
    """

    quant_type: str | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    skip: bool = False

    @model_validator(mode="after")
    def _skips_or_changes(self) -> Override:
        if self.skip and (self.quant_type, self.block_size, self.double_quant) != (None, None, None):
            raise ValueError("a pattern either has skip: true or says how its modules are quantized, not both")
        return self


class QuantConfig(_Checked):
    """Which linear layers are quantized to 4 bits, and how.

    Attributes:
        quant_type: a name in `QUANT_TYPES`, or null: quantize only the modules to which an override gives a quant_type.
        block_size: elements that share a scale, one of 32, 64, ..., 4096.
        double_quant: store the scales in 8 bits.
        storage_dtype: dtype that files give the packed bytes; the bytes are the same. FSDP1 needs a float dtype.
        skip: patterns of modules left in 16 bits. A list replaces the default, which is the output head.
        overrides: pattern -> settings that differ there. The first match counts. Skipped modules stay skipped.
    """

    quant_type: str | None = "nf4"
    block_size: int = 64
    double_quant: bool = True
    storage_dtype: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    skip: tuple[str, ...] = DEFAULT_SKIP
    overrides: dict[str, Override] = Field(default_factory=dict)

    def assign(self, modules: Iterable[str]) -> dict[str, WeightFormat | None]:
        """Return the format of each linear layer, None for those left in 16 bits.

        Args:
            modules: the paths of all linear layers of a model.

        Raises:
            ConfigError: a pattern matches none of them, or other patterns leave it nothing to change. The message names
                every such pattern.
        """
        paths = list(modules)
        problems: list[tuple[str, str]] = []
        undecided = dict.fromkeys(paths)  # an ordered set: modules that no pattern has matched yet
        formats: dict[str, WeightFormat | None] = dict.fromkeys(paths)
        rules = [("skip", pattern, Override(skip=True)) for pattern in self.skip]
        rules += [("overrides", pattern, override) for pattern, override in self.overrides.items()]
        for key, pattern, rule in rules:
            matched = [path for path in paths if _compiled(pattern).fullmatch(path)]
            decided = [path for path in matched if path in undecided]
            if not matched and (key, self.skip) != ("skip", DEFAULT_SKIP):  # a model need not have a head
                problems.append((key, f"no linear layer matches '{pattern}'{_nearest(pattern, paths)}"))
            elif not decided and key == "overrides":
                problems.append((key, f"'{pattern}' changes nothing: all it matches is skipped or overridden before"))
            for path in decided:
                formats[path] = self._format(rule)
                del undecided[path]
        if problems:
            raise ConfigError("\n".join(f"{key}: {message}" for key, message in problems), problems)
        return formats | dict.fromkeys(undecided, self._format(Override()))

    def _format(self, override: Override) -> WeightFormat | None:
        quant_type = override.quant_type or self.quant_type
        if override.skip or quant_type is None:
            return None
        double_quant = self.double_quant if override.double_quant is None else override.double_quant
        return WeightFormat(quant_type, override.block_size or self.block_size, double_quant)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Compile a pattern by the rule of PEFT's rank_pattern, which compares suffixes if the pattern is a plain name."""
    try:
        re.compile(pattern)  # by itself, so that an error counts positions in the user's pattern
        return re.compile(rf"(.*\.)?({pattern})")
    except re.error as error:
        raise ConfigError(f"'{pattern}' is not a regular expression: {error}") from None


def _nearest(pattern: str, paths: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest name that would have matched, or "" if none is near."""
    suffixes = dict.fromkeys(path.split(".", cut)[-1] for path in paths for cut in range(path.count("."), -1, -1))
    return did_you_mean(pattern, suffixes)
