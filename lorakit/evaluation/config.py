"""The `eval` section of a recipe, and the files that it names: instructions for the base, text for perplexity.

The base model gets the strongest prompt we can give it (instructions and a few worked examples), the tuned model the
short prompt that it was trained on. Otherwise a run would "help" merely because tuning told the model the task.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from ..errors import ConfigError, DataError
from ..settings import Settings
from .metrics import MetricConfig, metric_config

AnyMetric = Annotated[SerializeAsAny[MetricConfig], BeforeValidator(metric_config)]


class BasePrompt(Settings):
    """The prompt of the base model.

    Raises:
        ConfigError: both `instructions` and `instructions_file` are given.
    """

    instructions: str | None = Field(None, min_length=1, description="system prompt in place of the record's own")
    instructions_file: Path | None = Field(None, description="text file with the instructions")
    examples: int = Field(4, ge=0, description="training records shown before the question, as earlier turns")

    @model_validator(mode="after")
    def _instructions_once(self) -> BasePrompt:
        if self.instructions is not None and self.instructions_file is not None:
            raise ValueError("give either 'instructions' or 'instructions_file', not both")
        return self

    def text(self) -> str | None:
        """Return the instructions, read from the file where one is named.

        Raises:
            ConfigError: the file cannot be read or is empty.
        """
        if self.instructions_file is None:
            return self.instructions
        try:
            text = self.instructions_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"instructions_file {self.instructions_file} cannot be read: {error}") from error
        if not text:
            raise ConfigError(f"instructions_file {self.instructions_file} is empty")
        return text


class EvalConfig(Settings):
    """The evaluation on the held-out records, before and after training.

    Raises:
        ConfigError: an unknown key or metric, a wrong type, a value out of range, or two metrics of one name.
    """

    metrics: list[AnyMetric] = Field(
        default=[metric_config("exact_match"), metric_config("chrf")],
        min_length=1,
        description="mappings with `kind` and its parameters, or bare kinds",
    )
    base_prompt: BasePrompt = Field(BasePrompt(), description="the prompt of the base model")
    max_new_tokens: int = Field(256, ge=1, description="maximum number of tokens in an answer")
    batch_size: int = Field(16, ge=1, description="answers generated at a time")
    general_text: Path | None = Field(None, description="text for the general perplexity; null: lorakit's own")
    bootstrap_samples: int = Field(2000, ge=100, description="number of times that rows are redrawn for an interval")
    limit: int | None = Field(None, ge=1, description="number of held-out records to evaluate; null: all")

    @model_validator(mode="after")
    def _labels_differ(self) -> EvalConfig:
        labels = [metric.label for metric in self.metrics]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two metrics are called '{twice[0]}'; give one of them another 'name'")
        return self


def general_text(path: Path | None = None) -> str:
    """Return the text for general perplexity: the file at `path`, or the one that comes with lorakit.

    Raises:
        DataError: the file cannot be read as UTF-8 text or holds nothing but whitespace.
    """
    if path is None:
        return resources.files(__package__).joinpath("general_text.txt").read_text(encoding="utf-8")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"general_text {path} cannot be read: {error}") from error
    if not text.strip():
        raise DataError(f"general_text {path} is empty; perplexity needs a few hundred words or more")
    return text
