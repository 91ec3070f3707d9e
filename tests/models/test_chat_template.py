"""Chat templates: which one a conversation gets, and what it gets of messages, tools and the day."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from made import SPECIAL, byte_level, make_tokenizer, small_decoder

from lorakit import Tokenizer, generate, load_tokenizer
from lorakit.models import chat_template
from lorakit.models.chat_template import ChatMessages

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "zip", "description": "naïve", "a": 1}}]


def build(folder: Path, template: Any) -> Tokenizer:
    return make_tokenizer(folder, template, SPECIAL, ["<|im_end|>"], byte_level)


def test_tools_keep_their_order_and_their_letters(tmp_path: Path) -> None:
    tok = build(tmp_path, "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{{ tools is none }}")
    written = '{"type": "function", "function": {"name": "zip", "description": "naïve", "a": 1}}'
    assert tok.render_chat(MESSAGES, tools=TOOLS) == f"{written}False"
    assert tok.render_chat(MESSAGES) == "True" and tok.render_chat(MESSAGES, tools=[]) == "False"
    both = ChatMessages(MESSAGES, TOOLS)
    assert tok.render_chat(both) == tok.render_chat(both[:1]) == f"{written}False"
    assert both[0] == MESSAGES[0] and both == MESSAGES


def test_a_template_of_its_own_for_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tok = build(tmp_path, named)
    assert (tok.render_chat(MESSAGES), tok.render_chat(MESSAGES, tools=TOOLS)) == ("plain", "tools")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).render_chat(MESSAGES, tools=TOOLS) == "file"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("file for tools")
    tok = load_tokenizer(tmp_path)
    assert (tok.render_chat(MESSAGES), tok.render_chat(MESSAGES, tools=TOOLS)) == ("file", "file for tools")


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_the_names_that_templates_read(tmp_path: Path, key: str) -> None:
    tok = build(tmp_path, "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}")
    assert tok.render_chat([{"role": "assistant", "content": "a", key: "b"}]) == "b|b"


def test_the_day_is_that_of_loading_or_a_chosen_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def it_is(day: int) -> None:
        now = classmethod(lambda cls, tz=None: cls(2026, 11, day, 23, 59))
        monkeypatch.setattr(chat_template, "datetime", type("Clock", (datetime.datetime,), {"now": now}))

    it_is(27)
    tok = build(tmp_path, "{{ strftime_now('%d %b %Y %H:%M') }}")
    assert tok.render_chat(MESSAGES) == "27 Nov 2026 00:00" and not tok.has_own_date
    it_is(28)
    assert tok.render_chat(MESSAGES) == "27 Nov 2026 00:00"  # a conversation over midnight stays one conversation
    assert load_tokenizer(tmp_path).render_chat(MESSAGES) == "28 Nov 2026 00:00"
    chosen = datetime.date(2024, 2, 29)
    for dated in (load_tokenizer(tmp_path, chosen), tok.on(chosen)):
        assert dated.render_chat(MESSAGES) == "29 Feb 2024 00:00" and dated.has_own_date
    assert tok.date == datetime.date(2026, 11, 27)


def test_whether_a_template_asks_for_the_day(tmp_path: Path) -> None:
    assert build(tmp_path, "{{ strftime_now('%Y') }}").is_dated
    assert not build(tmp_path, "{{ messages[0].content }}").is_dated
    named = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "{{ strftime_now('%Y') }}"}]
    assert build(tmp_path, named).is_dated


def test_generation_asks_with_the_tools(tmp_path: Path) -> None:
    tok = build(tmp_path, "{{ messages[0].content }}{% if tools %} {{ tools | tojson }}{% endif %}")
    asked: list[str] = []
    model, render = small_decoder(), tok.render_chat
    tok.render_chat = lambda *given: (asked.append(render(*given)), asked[-1])[1]  # type: ignore[method-assign]
    generate(model, tok, MESSAGES[:1], 1, tools=TOOLS)
    generate(model, tok, [ChatMessages(MESSAGES[:1], TOOLS), MESSAGES[:1]], 1)
    assert asked == [f"Hi {json.dumps(TOOLS, ensure_ascii=False)}"] * 2 + ["Hi"]
