"""Recipes: one YAML file that describes a whole run, from the base model to the metrics.

A recipe is checked as a whole before anything is loaded. One report lists unknown keys, wrong types, repeated keys,
missing files and unknown models, each with its line. Relative paths start at the current folder, as with any
command-line tool, and stay relative in the recipe that a run saves.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..adapters.config import LoraConfig
from ..data.formats import AUTO, RECORD_FORMATS, record_format
from ..errors import ConfigError, did_you_mean
from ..evaluation.config import EvalConfig
from ..files import write_text
from ..inspection.probes import ProbeConfig
from ..models.devices import parse_device
from ..models.pretrained import KNOWN_MODELS
from ..quantization import BLOCK_SIZES, QUANT_TYPES
from ..settings import Settings
from ..training.config import Seed, TrainConfig
from .yaml_source import YamlSource, dump_yaml, read_yaml

INPUT_FILES = (
    "data.train",
    "data.eval",
    "eval.base_prompt.instructions_file",
    "eval.general_text",
    "eval.metrics.*.schema_file",
)
HANDED_DOWN = {"output": "output", "seed": "seed", "max_length": "data.max_length"}  # `train`'s key -> the recipe's


class ModelSection(Settings):
    """The frozen base model: its path and the format of its weights."""

    path: str = Field(description="a folder in Hugging Face's layout, or a known name such as smollm2-135m-instruct")
    quant_type: str | None = Field(
        "nf4", description=f"four-bit codebook, {' or '.join(QUANT_TYPES)}; null: not quantized"
    )
    block_size: int = Field(64, description="number of weights that share one scale")
    double_quant: bool = Field(True, description="quantize the scales too, to 8 bits")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="dtype of the matrix products")
    device: str = Field("cpu", description="device of the model: cpu, cuda, cuda:1, ...")

    @field_validator("device")
    @classmethod
    def _device_exists_somewhere(cls, value: str) -> str:
        parse_device(value)
        return value

    @field_validator("quant_type")
    @classmethod
    def _quant_type_exists(cls, value: str | None) -> str | None:
        if value is not None and value not in QUANT_TYPES:
            raise ValueError(f"unknown '{value}'{did_you_mean(value, QUANT_TYPES)} (known: {', '.join(QUANT_TYPES)})")
        return value

    @field_validator("block_size")
    @classmethod
    def _block_size_exists(cls, value: int) -> int:
        if value not in BLOCK_SIZES:
            raise ValueError(f"must be one of {', '.join(map(str, BLOCK_SIZES))} (got {value})")
        return value


class DataSection(Settings):
    """The training records and the held-out records.

    Raises:
        ConfigError: both `eval` and `eval_fraction` are set.
    """

    train: Path = Field(description="JSONL file of conversations to train on")
    format: str = Field(
        AUTO, description=f"format of the records: {', '.join(RECORD_FORMATS)}; {AUTO}: recognized from the records"
    )
    eval: Path | None = Field(None, description="JSONL file of held-out conversations")
    eval_fraction: float | None = Field(
        None, gt=0, lt=1, description="share of `train` to hold out, instead of a file `eval`"
    )
    max_length: int = Field(1024, ge=2, description="longest conversation in tokens; a longer one is an error")
    date: datetime.date | None = Field(
        None,
        description="the date for chat templates that ask for today's, such as 2026-11-28; null: the day on which the "
        "run begins, which its recipe.yaml then keeps",
    )

    @field_validator("format")
    @classmethod
    def _format_exists(cls, name: str) -> str:
        record_format(name)
        return name

    @model_validator(mode="after")
    def _one_source_of_evaluation(self) -> DataSection:
        if self.eval is not None and self.eval_fraction is not None:
            raise ValueError("set eval or eval_fraction, not both")
        return self


class Recipe(Settings):
    """The description of one run.

    `seed`, `output` and `data.max_length` are set here only; `train` receives them.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range, a start that needs data, or `train`
            contradicts the recipe.
    """

    title: str = Field(description="the purpose of the run, in a few words")
    output: Path = Field(description="folder for everything that the run writes")
    seed: Seed = Field(0, description="seed of the adapter's start, the data's order and dropout")
    model: ModelSection
    data: DataSection
    lora: LoraConfig = Field(default_factory=LoraConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    probes: ProbeConfig | None = Field(None, description="measurements for probes.jsonl while training; null: none")
    eval: EvalConfig | None = Field(None, description="task metrics before and after; null: the held-out loss only")

    @field_validator("lora")
    @classmethod
    def _start_needs_no_data(cls, lora: LoraConfig) -> LoraConfig:
        if needs := lora.start.needs:
            message = (
                f"'{lora.start.name}' needs `{needs}`, which a recipe cannot give; give them to add_adapter in Python"
            )
            raise ConfigError(message, [("init_lora_weights", message)])
        return lora

    @model_validator(mode="after")
    def _metrics_have_records(self) -> Recipe:
        if self.eval is not None and self.data.eval is None and self.data.eval_fraction is None:
            raise ValueError("eval needs held-out records; set data.eval or data.eval_fraction, or eval: null")
        return self

    @model_validator(mode="after")
    def _names_are_text(self) -> Recipe:
        """Refuse a name that no file of the run could hold, before the run has anything to write."""
        for key, name in (("output", self.output), ("data.train", self.data.train), ("data.eval", self.data.eval)):
            try:
                str(name).encode()
            except UnicodeEncodeError:
                raise ValueError(f"{key} is {str(name)!r}, a name that is not UTF-8; rename it") from None
        return self

    @model_validator(mode="after")
    def _hand_down(self) -> Recipe:
        """Give `train` the settings that the recipe states for the whole run."""
        shared = {"output": self.output, "seed": self.seed, "max_length": self.data.max_length}
        for key, value in shared.items():
            own_value = getattr(self.train, key)
            if key in self.train.model_fields_set and own_value != value:
                raise ValueError(f"train.{key} ({own_value}) contradicts {HANDED_DOWN[key]} ({value}); set that alone")
        object.__setattr__(self, "train", self.train.model_copy(update=shared))
        return self


def load_recipe(path: str | PathLike[str], overrides: Sequence[str] = (), check_files: bool = True) -> Recipe:
    """Read a recipe and check all of it.

    Args:
        path: the YAML file.
        overrides: "section.key=value" with the value in YAML: "train.lr=1e-4", "data.eval=null".
        check_files: whether to report input files and models that do not exist; False for the recipe of an old run,
            whose data may be gone.

    Raises:
        ConfigError: the recipe has problems; the message has each with file:line and the nearest right key, and
            `problems` lists them.
    """
    source = read_yaml(_existing_recipe(Path(path)))
    for assignment in overrides:
        source.override(assignment)
    problems, recipe = list(source.problems), None
    try:
        recipe = Recipe(**source.values)
    except ConfigError as error:
        problems += [(source.place(key), key, _own_section(key, message)) for key, message in error.problems]
    if check_files:
        problems += [(source.place(key), key, message) for key, message in _missing(source.values)]
    if recipe is None or problems:
        raise _report(source, problems)
    return recipe


def save_recipe(recipe: Recipe, path: str | PathLike[str]) -> None:
    """Write `recipe` as YAML with every default filled in; `load_recipe` returns an equal one."""
    # Without the settings that `train` receives: an override of `seed` must not contradict an old `train.seed`.
    values = recipe.model_dump(mode="json", exclude={"train": set(HANDED_DOWN)})
    write_text(path, dump_yaml(values))


def input_files(recipe: Recipe) -> dict[str, Path]:
    """Return the files that a recipe reads: dotted key -> path."""
    values = recipe.model_dump()
    found = (pair for pattern in INPUT_FILES for pair in _values_at(values, pattern.split(".")))
    return {key: Path(name) for key, name in found if isinstance(name, str | Path)}


def _own_section(key: str, message: str) -> str:
    """Return the message on a key; with the right place of one that is in the wrong one, as `lr` outside `train`."""
    name = key.rpartition(".")[2]
    if not message.startswith("unknown key") or "here it is called" in message:
        return message
    sections: dict[str, type[Settings]] = {
        "model": ModelSection, "data": DataSection, "lora": LoraConfig, "train": TrainConfig, "eval": EvalConfig,
    }  # fmt: skip
    places = [f"{section}.{name}" for section, kind in sections.items() if name in kind.model_fields]
    places += [name] if name in Recipe.model_fields else []
    return f"unknown key; here it is called '{HANDED_DOWN.get(name, places[0])}'" if places else message


def _existing_recipe(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder, expected a recipe such as {path / 'recipe.yaml'}")
    raise ConfigError(f"{path}: no such recipe{_nearest(path, '*.y*ml')}")


def _missing(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, message) for each input file that is missing, and for the model if it is.

    It reads the values as written instead of a `Recipe`, so that missing files are reported beside wrong keys.
    """
    for pattern in INPUT_FILES:
        for key, name in _values_at(values, pattern.split(".")):
            if not isinstance(name, str | Path) or Path(name).is_file():
                continue
            if Path(name).is_dir():
                yield key, f"is a folder, expected a file: {name}"
            else:
                yield key, f"no such file: {name}{_nearest(Path(name), '*')}"
    for key, name in _values_at(values, ["model", "path"]):
        if isinstance(name, str) and name not in KNOWN_MODELS and not Path(name).expanduser().is_dir():
            hint = did_you_mean(name.lower(), KNOWN_MODELS)
            yield key, f"'{name}' is neither a folder nor a known model ({', '.join(KNOWN_MODELS)}){hint}"


def _values_at(values: object, path: Sequence[str], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) for each value at `path`; "*" stands for every item of a list."""
    if not path:
        yield prefix.removesuffix("."), values
    elif path[0] == "*" and isinstance(values, list):
        for index, item in enumerate(values):
            yield from _values_at(item, path[1:], f"{prefix}{index}.")
    elif isinstance(values, Mapping) and path[0] in values:
        yield from _values_at(values[path[0]], path[1:], f"{prefix}{path[0]}.")


def _nearest(path: Path, pattern: str) -> str:
    """Return a "did you mean" for a missing file, among its folder's files that match `pattern`."""
    return did_you_mean(str(path), [str(neighbor) for neighbor in path.parent.glob(pattern)])


def _report(source: YamlSource, problems: Sequence[tuple[str, str, str]]) -> ConfigError:
    lines = [": ".join(part for part in problem if part) for problem in problems]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return ConfigError(
        f"{source.name} is not valid ({count}):\n" + "\n".join(f"  {line}" for line in lines),
        [(key, message) for _, key, message in problems],
    )
