"""`lorakit generate`: answers of a run's model, for scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .console import say


def generate(
    run: Annotated[Path, typer.Argument(help="folder of a finished run", show_default=False)],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="each starts its own conversation")],
    *,
    base: Annotated[bool, typer.Option("--base", help="ask the base model, without the adapter")] = False,
    system: Annotated[str | None, typer.Option(help="system prompt; default: that of the run's data")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="maximum tokens in an answer")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="sample among the tokens that reach this probability")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="makes sampling repeatable")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line: prompt, answer")] = False,
) -> None:
    """Answer prompts with a run's tuned model, or with --base with the model that it started from."""
    from ..models import generate as answers_of
    from ..runs.chat import Chat

    chat = Chat(run, adapted=not base, system=system)
    conversations = [[*chat.messages, {"role": "user", "content": prompt}] for prompt in prompts]
    tools = chat.messages.tools
    answers = answers_of(
        chat.model, chat.tok, conversations, max_new_tokens, temperature, top_p, seed=seed, tools=tools
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        say(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) if as_json else answer)
