"""Chat templates of many families: as transformers renders them, trained as they are asked, and the page that says so.

Run as `python tests/peers/models/test_chat_families.py` to write the table and the examples into the page.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "peers")]

from chat_families import CONVERSATIONS, FAMILIES, Family, outcome, record_of, tokenizer_of, trained_texts  # noqa: E402

from lorakit import Tokenizer  # noqa: E402
from lorakit.errors import DataError  # noqa: E402
from lorakit.models import resolve_model  # noqa: E402

transformers = importlib.import_module("transformers")
PAGE = ROOT / "docs" / "reference" / "chat-templates.md"
BEGIN, END = "<!-- made by tests/peers/models/test_chat_families.py -->", "<!-- end -->"


@cache
def loaded(family: Family) -> Tokenizer:
    return tokenizer_of(family, Path(tempfile.mkdtemp()), resolve_model("smollm2-135m-instruct"))


@cache
def theirs(family: Family) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(loaded(family).folder)


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
class TestFamilies:
    def test_renders_as_transformers(self, family: Family, kind: str) -> None:
        messages, tools = CONVERSATIONS[kind]
        for count in range(1, len(messages) + 1):
            asks = messages[count - 1]["role"] != "assistant"
            given: dict[str, Any] = {"tools": tools, "add_generation_prompt": asks}
            try:
                expected = theirs(family).apply_chat_template(messages[:count], tokenize=False, **given)
            except Exception:  # jinja2's, or what a template's own code raises
                with pytest.raises(DataError, match="chat template, line"):
                    loaded(family).render_chat(messages[:count], asks, tools)
                continue
            assert loaded(family).render_chat(messages[:count], asks, tools) == expected
            ids = theirs(family).apply_chat_template(messages[:count], return_dict=False, **given)
            assert loaded(family).encode(expected) == ids

    def test_is_trained_as_it_is_asked(self, family: Family, kind: str) -> None:
        tok, record = loaded(family), record_of(kind)
        example, _ = outcome(tok, kind)
        if example is None:
            return
        messages = record.as_dicts()
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        asked = [tok.encode(tok.render_chat(messages[:index], True, record.tools)) for index in turns]
        trained, renderings = trained_texts(tok, example), [example.input_ids[a:b] for a, b in example.bounds()]
        assert len(trained) == len(turns) and len(renderings) in (1, len(turns))
        renderings *= len(turns) // len(renderings)
        ends = [tok.decode([token], skip_special_tokens=False) for token in tok.eos_ids]
        for question, ids, text, index in zip(asked, renderings, trained, turns, strict=True):
            assert ids[: len(question) - 1] == question[:-1]  # the last may merge with what the answer begins with
            said = messages[index]["content"].removeprefix("<think>\n")  # which the question may have opened
            assert said in text and text.endswith(tuple(ends)) and sum(map(text.count, ends)) == 1


# ---- the page --------------------------------------------------------------------------------------------------------


def table() -> str:
    """Return the part of the page that follows from the templates."""
    kinds = [kind for kind in CONVERSATIONS if kind != "one turn"]
    lines = [f"| Family | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    examples = []
    for family in FAMILIES:
        cells = [outcome(loaded(family), kind)[1] for kind in kinds]
        lines.append(f"| {family.name} | {' | '.join(cells)} |")
        examples.append(example(family))
    return "\n".join([*lines, "", "```text", "\n\n".join(examples), "```"])


def example(family: Family) -> str:
    """Return what one turn is asked with, and what of it is trained."""
    tok = loaded(family)
    asked = tok.render_chat(CONVERSATIONS["one turn"][0][:1], add_generation_prompt=True)
    found, words = outcome(tok, "one turn")
    shown = words if found is None else trained_texts(tok, found)[0]
    return "\n".join((family.name, f"  asked    {one_line(asked)}", f"  trained  {one_line(shown)}"))


def one_line(text: str) -> str:
    """Return a text on one line, and of a long one the end."""
    line = text.replace("\n", "↵")
    return line if len(line) <= 100 else f"…{line[-100:]}"


def with_table(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


def test_the_page_says_what_the_templates_do() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert BEGIN in page and with_table(page) == page, "run: python tests/peers/models/test_chat_families.py"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
