"""Adapters on transformers' classes: a tenth of the page's table, or all of it (`make grid`)."""

from __future__ import annotations

import os

import pytest
from class_table import outcome, read_page
from small_models import classes

EXPECTED = read_page()
CHECKED = [kind for kind in classes() if kind.name in EXPECTED][:: 1 if os.environ.get("LORAKIT_GRID") == "all" else 10]


@pytest.mark.parametrize("kind", CHECKED, ids=str)
def test_a_class_is_right_or_refused(kind) -> None:  # type: ignore[no-untyped-def]
    assert outcome(kind) == EXPECTED[kind.name]


def test_the_page_lists_the_families_that_people_use() -> None:
    assert len(EXPECTED) >= 200
    names = ("LlamaForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration", "ViTForImageClassification")
    assert all(EXPECTED[name] == "right" for name in (*names, "WhisperForConditionalGeneration", "Wav2Vec2ForCTC"))
