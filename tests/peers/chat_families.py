"""Chat templates of many families, with their special tokens, and what lorakit makes of conversations with them.

Most templates are files of the installed TRL, which has them from the models. Those that it lacks are written here in
our own words: the structure is the model's, the text is not.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
from made import byte_level, sentencepiece

from lorakit import Record, Tokenizer, load_tokenizer
from lorakit.data import Example, encode_record
from lorakit.data.records import parse_record
from lorakit.errors import DataError

# System text in the first user turn; BOS and EOS around every pair of turns.
LLAMA2 = (
    "{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if first else messages) %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first and first %}<<SYS>>\n{{ first }}\n<</SYS>>\n\n{% endif %}"
    "{{ m.content.strip() }} [/INST]{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
# No system role; BOS once.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
# System text before the last question, if the question is the last message; tools before the last question.
NEMO = (
    "{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if first else messages %}"
    "{% set asked = turns | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}{% for m in turns %}"
    "{% if m.role == 'user' %}{% if tools and m == asked[-1] %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "{% endif %}[INST]{% if loop.last and first %}{{ first + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | map(attribute='function') | list | tojson }}{{ eos_token }}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content | tojson }}[/TOOL_RESULTS]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Tags for the roles that it knows, and nothing for others.
ZEPHYR = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
    "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# All system text first; no line ends anywhere.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
LLAMA_TOKENS = ("<s>", "</s>", "[INST]", "[/INST]")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>")
CHATML_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
GEMMA_TOKENS = ("<bos>", "<end_of_turn>", "<start_of_turn>")
PHI_TOKENS = ("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
DEEPSEEK_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
GPT_TOKENS = ("<|start|>", "<|return|>", "<|call|>", "<|end|>", "<|message|>", "<|channel|>")
GLM_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>", "<|assistant|>", "<|system|>")


@dataclass(frozen=True)
class Family:
    """A chat template and the tokenizer that it needs.

    Attributes:
        name: of the models.
        template: a text of this file, or the name of one of TRL's files; None: the tokenizer of the quickstart.
        tokens: special tokens: BOS, the end of a turn, others.
        ends: how many tokens after BOS end a generation.
        swallows: whether special tokens take the white space after them.
        build: makes the tokenizer below them.
    """

    name: str
    template: str | None
    tokens: tuple[str, ...] = ()
    ends: int = 1
    swallows: bool = False
    build: Callable[[], tokenizers.Tokenizer] = byte_level

    def source(self) -> str:
        """Return the template's text."""
        assert self.template is not None
        if "{" in self.template:
            return self.template
        folder = Path(importlib.import_module("trl").__file__).parent / "chat_templates"
        return (folder / f"{self.template}.jinja").read_text(encoding="utf-8")

    def write(self, folder: Path) -> Path:
        """Write the tokenizer's folder for both libraries."""
        backend = self.build()
        backend.add_special_tokens(
            [
                tokenizers.AddedToken(token, special=True, normalized=False, rstrip=self.swallows)
                for token in self.tokens
            ]
        )
        folder.mkdir(parents=True, exist_ok=True)
        backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": self.tokens[0], "eos_token": self.tokens[1],
            "chat_template": self.source(),
        }  # fmt: skip
        ends = [backend.token_to_id(token) for token in self.tokens[1 : 1 + self.ends]]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        return folder


FAMILIES = (
    Family("Llama 2", LLAMA2, LLAMA_TOKENS, build=sentencepiece),
    Family("Llama 3", "llama3", LLAMA3_TOKENS),
    Family("Llama 3.1", "llama3_1", LLAMA3_TOKENS),
    Family("Llama 3.2", "llama3_2", LLAMA3_TOKENS),
    Family("Qwen2.5", "qwen2_5", CHATML_TOKENS),
    Family("Qwen3", "qwen3", CHATML_TOKENS),
    Family("Qwen3 Instruct 2507", "qwen3_instruct_2507", CHATML_TOKENS),
    Family("Qwen3.5", "qwen3_5_think", CHATML_TOKENS),
    Family("Mistral 7B v0.2", MISTRAL, LLAMA_TOKENS, build=sentencepiece),
    Family("Mistral Nemo", NEMO, LLAMA_TOKENS),
    Family("Gemma, Gemma 2", "gemma", GEMMA_TOKENS),
    Family("Gemma 3", "gemma3", GEMMA_TOKENS),
    Family("Phi-3", "phi3", PHI_TOKENS, swallows=True),
    Family("Phi-3.5", "phi3_5", PHI_TOKENS, swallows=True),
    Family("SmolLM2", None),
    Family("LFM2", "lfm2", CHATML_TOKENS),
    Family("Zephyr, TinyLlama", ZEPHYR, ("<s>", "</s>"), build=sentencepiece),
    Family("DeepSeek V3", DEEPSEEK, DEEPSEEK_TOKENS),
    Family("DeepSeek R1 distills", "deepseek_r1_distill", DEEPSEEK_TOKENS),
    Family("gpt-oss", "gptoss", GPT_TOKENS, ends=2),
    Family("GLM 4.5", "glm4moe", GLM_TOKENS, ends=3),
)


def _turn(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "The weather in a city."}}]
CALL = {"id": "callabc12", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Tromsø"}}}
TWO = [_turn("user", "Hi"), _turn("assistant", "Hello!"), _turn("user", "Why?"), _turn("assistant", "Because.")]
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "one turn": (TWO[:2], None),
    "two turns": (TWO, None),
    "system prompt": ([_turn("system", "Be brief."), *TWO], None),
    "reasoning": (
        [
            _turn("user", "2+2?"), _turn("assistant", "4", reasoning_content="add"),
            _turn("user", "3+3?"), _turn("assistant", "6", reasoning_content="again"),
        ],
        None,
    ),
    "reasoning in `<think>`": (
        [
            _turn("user", "2+2?"), _turn("assistant", "<think>\nadd\n</think>\n\n4"),
            _turn("user", "3+3?"), _turn("assistant", "<think>\nagain\n</think>\n\n6"),
        ],
        None,
    ),
    "tools": (
        [
            _turn("user", "Weather?"), _turn("assistant", "", tool_calls=[CALL]),
            _turn("tool", "22 °C", name="get_weather", tool_call_id="callabc12"), _turn("assistant", "Warm."),
        ],
        TOOLS,
    ),
}  # fmt: skip


def record_of(kind: str) -> Record:
    """Return one of the conversations as a record."""
    messages, tools = CONVERSATIONS[kind]
    return parse_record(json.dumps({"messages": messages} | ({"tools": tools} if tools else {})), "train.jsonl:1")


def tokenizer_of(family: Family, folder: Path, smollm2: Path) -> Tokenizer:
    """Return a family's tokenizer."""
    return load_tokenizer(smollm2 if family.template is None else family.write(folder))


def outcome(tok: Tokenizer, kind: str) -> tuple[Example | None, str]:
    """Return a record's example, if it is not refused, and what became of it in a few words."""
    try:
        example = encode_record(tok, record_of(kind), 10_000)
    except DataError as error:
        return None, f"refused: {_reason(str(error))}"
    return example, "trained" if len(example.lengths) == 1 else "trained, a rendering a turn"


def trained_texts(tok: Tokenizer, example: Example) -> list[str]:
    """Return the text of each run of trained tokens."""
    pairs = zip(example.loss_mask, example.input_ids, strict=True)
    runs = [[token for _, token in run] for is_trained, run in groupby(pairs, key=lambda pair: pair[0]) if is_trained]
    return [tok.decode(run, skip_special_tokens=False) for run in runs]


def _reason(message: str) -> str:
    reasons = {
        "leaves out": "left out",
        "is asked for this answer": "asked otherwise",
        "without an end-of-turn token": "no end",
        "refuses these messages": "by the template",
        "fails on these messages": "by the template",
    }
    return next(words for part, words in reasons.items() if part in message)
