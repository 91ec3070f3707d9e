"""Keys of other tools are answered with lorakit's own, which exist."""

from __future__ import annotations

from typing import Any

import pytest

from lorakit import LoraConfig, TrainConfig
from lorakit.errors import ConfigError
from lorakit.other_tools import OTHER_TOOLS, other_tools_hint
from lorakit.runs.recipe import Recipe


@pytest.mark.parametrize("key", [key for key, meant in OTHER_TOOLS.items() if " " not in meant.partition(": ")[0]])
def test_what_a_hint_names_is_a_key_of_the_recipe(key: str) -> None:
    kind: Any = Recipe
    for part in OTHER_TOOLS[key].partition(": ")[0].split("."):
        annotation = kind.model_fields[part].annotation
        kind = next(
            (one for one in (annotation, *getattr(annotation, "__args__", ())) if hasattr(one, "model_fields")), None
        )


@pytest.mark.parametrize("key", OTHER_TOOLS)
def test_no_hint_is_for_a_key_that_exists(key: str) -> None:
    sections = (field.annotation for field in Recipe.model_fields.values())
    assert key not in Recipe.model_fields
    assert not any(key in getattr(section, "model_fields", {}) for section in sections)


def test_a_key_is_named_without_the_section_that_it_is_in() -> None:
    assert other_tools_hint("learning_rate", {"lr"}) == "; here it is 'lr'"
    assert other_tools_hint("Learning_Rate", ()) == "; here it is 'train.lr'"
    assert other_tools_hint("warmup_steps", ()) == "; here it is 'train.warmup_ratio': a share of the steps"
    assert other_tools_hint("logging_steps", ()) == "; every step is logged"
    assert other_tools_hint("anything", ()) == ""


def test_in_python_too() -> None:
    with pytest.raises(
        ConfigError, match="gradient_accumulation_steps: unknown key; here it is 'batch_size': all conv"
    ):
        TrainConfig(gradient_accumulation_steps=4)
    with pytest.raises(ConfigError, match="rank: unknown key; here it is 'r'"):
        LoraConfig(rank=8)
