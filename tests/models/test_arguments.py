"""Models, tokenizers and prompts that are not what `generate` and `perplexity` take: errors that say what to use."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made import conversations, small_decoder, small_tokenizer
from torch import nn

from lorakit import generate, load_model, load_tokenizer, plan
from lorakit.errors import CheckpointError, ConfigError, DataError
from lorakit.evaluation.perplexity import perplexity

ASKED = {"role": "user", "content": "fox?"}


class Foreign(nn.Linear):
    """A model of another library."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.config = SimpleNamespace(_name_or_path="their/model")

    def generate(self) -> None:
        raise AssertionError("not called")


def test_a_model_of_another_library(tmp_path: Path) -> None:
    tok, foreign = small_tokenizer(tmp_path), Foreign()
    message = (
        r"{} takes a lorakit Decoder, not a Foreign \(model.generate is .* load it with lk.load_model\('their/model'"
    )
    with pytest.raises(ConfigError, match=message.format("generate")):
        generate(foreign, tok, "fox")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message.format("perplexity")):
        perplexity(foreign, tok, "fox and dog")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"a config.json or a Decoder, not a Foreign"):
        plan(foreign)  # type: ignore[arg-type]
    for load in (load_model, load_tokenizer):
        with pytest.raises(
            CheckpointError, match=r"expected a checkpoint folder or the name of a known .* not a Foreign"
        ):
            load(foreign)  # type: ignore[operator]


def test_a_tokenizer_of_another_library() -> None:
    theirs: Any = SimpleNamespace(name_or_path="their/model")
    for read in (generate, perplexity):
        with pytest.raises(
            ConfigError, match=r"a SimpleNamespace, not lorakit's: .*lk.load_tokenizer\('their/model'\)"
        ):
            read(small_decoder(), theirs, "fox and dog")


def test_planning_for_a_model_in_memory() -> None:
    model = small_decoder()
    assert plan(model) == plan(model.config)


def test_prompts_of_any_collection(tmp_path: Path) -> None:
    model, tok = small_decoder(), small_tokenizer(tmp_path)
    expected = generate(model, tok, ["fox", "dog"], 2)
    assert generate(model, tok, (text for text in ("fox", "dog")), 2) == expected  # type: ignore[arg-type]
    assert generate(torch.compile(model, backend="eager"), tok, ["fox", "dog"], 2) == expected  # type: ignore[arg-type]
    assert generate(model, tok, ["fox", [ASKED]], 2)[0] == expected[0]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "the prompt is a NoneType; expected a text, or a list of messages"),
        (7, "the prompt is a int"),
        ([7, 9], "prompt 0 is a int"),
        (torch.tensor([[1, 2]]), "prompt 0 is a Tensor"),
        (["fox", ["dog"]], "prompt 1 is a list"),
        (ASKED, r"one message; a conversation is a list of them: \[message\]"),
        ({"messages": [ASKED]}, r'the prompt is a record; .* x\["messages"\]\[:-1\]'),
        ([{"messages": [ASKED]}], r"prompt 0 is a record"),
        (conversations(1)[0], r"the prompt is a record; .* x.as_dicts\(\)\[:-1\]"),
        (["fox", *conversations(1)], "prompt 1 is a record"),
    ],
    ids=str,
)
def test_what_is_no_prompt(prompts: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        generate(small_decoder(), small_tokenizer(tmp_path), prompts)
