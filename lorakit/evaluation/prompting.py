"""Prompts that ask the base and the tuned model the same question.

The tuned model gets the short prompt that it was trained on: the record up to its answer. The base model has never seen
the task. It gets the strongest prompt that needs no training: instructions in place of the system prompt, and worked
examples as earlier turns (Brown et al. 2020, arXiv:2005.14165). Only so does the comparison show the gain of training.

Examples come from the training records alone; one from the held-out set would give an answer away.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from statistics import median

from ..data.conversations import Message, Problems, Record
from ..errors import DataError, LorakitError
from ..models import Decoder, Tokenizer
from ..models.chat_template import ChatMessages
from .metrics import METRICS, MetricConfig

Chat = ChatMessages  # as `Tokenizer.render_chat` and `generate` take them
Key = Callable[[Record], Hashable]


def split_record(record: Record) -> tuple[Chat, str]:
    """Return (the messages up to the last answer, that answer): the short prompt and its reference.

    Raises:
        DataError: the record does not end with an answer in words, or asks nothing before it.
    """
    *asked, answer = record.messages
    if answer.role != "assistant":
        message = (
            f"{record.source}: the last message is from '{answer.role}'; an evaluated record ends with 'assistant'"
        )
        raise DataError(message)
    if answer.extra.get("tool_calls"):
        raise DataError(f"{record.source}: the last answer calls a tool; there is no text to compare an output with")
    if not any(message.role == "user" for message in asked):
        raise DataError(f"{record.source}: there is no 'user' message before the answer, so nothing to ask the model")
    return Chat((message.as_dict() for message in asked), record.tools), answer.content


def split_all(records: Sequence[Record]) -> tuple[list[Chat], list[str]]:
    """Return the short prompts of records, and their references.

    Raises:
        DataError: as `split_record`, for all records at once (the first 20 are named).
    """
    problems, prompts, references = Problems(), list[Chat](), list[str]()
    for record in records:
        try:
            prompt, reference = split_record(record)
        except DataError as problem:
            problems.add(problem)
        else:
            prompts.append(prompt)
            references.append(reference)
    problems.raise_if_any()
    return prompts, references


def check_prompts(
    model: Decoder, tok: Tokenizer, prompts: Sequence[Chat], sources: Sequence[str], max_new_tokens: int, whose: str
) -> None:
    """Make sure that a model can answer every prompt; call it before an hour of training.

    Args:
        sources: the source of each prompt ("eval.jsonl:17"), for messages.
        whose: which prompts these are, for messages.

    Raises:
        DataError: the chat template refuses prompts, they leave no room for an answer in the model's context, or they
            have tokens without a row in its embedding (the first 20 are named).
    """
    problems = Problems()
    context, rows = model.config.context_length, model.config.vocab_size
    for prompt, source in zip(prompts, sources, strict=True):
        where = f"{source}: the prompt of the {whose}"
        try:
            ids = tok.encode(tok.render_chat(prompt, add_generation_prompt=True))
        except LorakitError as error:
            problems.add(DataError(f"{where}: {error}"))
            continue
        if not 0 < len(ids) <= context - max_new_tokens:
            problems.add(
                DataError(
                    f"{where} has {len(ids)} tokens; expected 1 to {context - max_new_tokens}, so that max_new_tokens "
                    f"({max_new_tokens}) more fit the context of {context}"
                )
            )
        elif max(ids) >= rows:
            problems.add(DataError(f"{where} has the token {max(ids)}; the model's embedding has {rows} rows"))
    problems.raise_if_any()


def prompted_messages(
    record: Record | Sequence[Message], instructions: str | None, examples: Sequence[Record] = ()
) -> Chat:
    """Build the base model's prompt: instructions, the examples' turns, then the question.

    Args:
        record: the record, whose tools go along, or messages without tools; a final answer is left out.
        instructions: the system prompt; None keeps the record's own.
        examples: training records from `choose_examples`; their turns come first, without their system prompts.
    """
    messages, tools = (list(record.messages), record.tools) if isinstance(record, Record) else (list(record), None)
    if messages and messages[-1].role == "assistant":
        messages.pop()
    own_system = [message.content for message in messages if message.role == "system"]
    system = "\n\n".join(own_system) if instructions is None else instructions
    turns = [message for example in examples for message in example.messages if message.role != "system"]
    turns += [message for message in messages if message.role != "system"]
    opening = [{"role": "system", "content": system}] if system else []
    return Chat([*opening, *(message.as_dict() for message in turns)], tools)


def choose_examples(train_records: Sequence[Record], count: int, key: Key | None = None) -> list[Record]:
    """Choose `count` training records that differ from each other, the same ones for the same records.

    The records are grouped by `key`. The groups take turns, the largest first, and each gives its most typical record:
    the one whose length is nearest to the group's median. Four examples of four topics teach more than four of one.

    Args:
        train_records: the training records, never the held-out records.
        count: the number to choose; fewer are returned if there are fewer records.
        key: record -> the value that should differ between examples; by default the reference answer.

    Raises:
        DataError: records do not end with an answer (the first 20 are named), unless `count` is 0.
    """
    if not count:
        return []
    key = key or (lambda record: split_record(record)[1])
    groups: defaultdict[Hashable, list[Record]] = defaultdict(list)
    try:
        split_all(train_records)
    except DataError as error:
        raise DataError(
            f"{error}\n(training records are the base model's worked examples; base_prompt.examples: 0 uses none)"
        ) from None
    for record in train_records:
        groups[key(record)].append(record)
    # sorted() is stable, so records and groups that tie stay in the order of the file
    queues = [_typical_first(group) for group in sorted(groups.values(), key=len, reverse=True)]
    rounds = max(map(len, queues), default=0)
    chosen = [queue[turn] for turn in range(rounds) for queue in queues if turn < len(queue)]
    return chosen[:count]


def key_for_metrics(metrics: Sequence[MetricConfig]) -> Key | None:
    """Return the key by which records differ for the first metric that has one; None when none has."""
    for metric in metrics:
        if example_key := METRICS[metric.kind].example_key:
            return lambda record: example_key(metric, split_record(record)[1])
    return None


def _typical_first(group: list[Record]) -> list[Record]:
    lengths = [sum(len(message.content) for message in record.messages) for record in group]
    middle = median(lengths)
    order = sorted(range(len(group)), key=lambda index: abs(lengths[index] - middle))
    return [group[index] for index in order]
