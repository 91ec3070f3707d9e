"""Records that a program gives as dicts: the same as from a file, and errors that say what to use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from made import adapted, conversations, small_tokenizer
from tokenizers import Tokenizer as Backend

from lorakit import Record, TrainConfig, adapter_parameters, load_records, save_records, train
from lorakit.data.given import given_records
from lorakit.errors import ConfigError, DataError

ASKED, ANSWERED = {"role": "user", "content": "fox?"}, {"role": "assistant", "content": "fox!"}
SETTINGS = TrainConfig(max_steps=3, batch_size=4, progress=False)


def as_dicts(records: list[Record]) -> list[dict[str, Any]]:
    return [{"messages": record.as_dicts(), **record.extra} for record in records]


@pytest.mark.parametrize("make", [list, tuple], ids=["list", "tuple"])
def test_training_on_dicts_is_training_on_records(make: type, tmp_path: Path) -> None:
    tok, results = small_tokenizer(tmp_path), []
    for records in (
        conversations(8),
        make(as_dicts(conversations(8))),
        conversations(4) + as_dicts(conversations(4, 4)),
    ):
        model = adapted()
        result = train(model, tok, records, SETTINGS, make(as_dicts(conversations(2, 9))))
        results.append((torch.cat([p.detach().flatten() for p in adapter_parameters(model)]), result.eval_loss))
    assert all(torch.equal(results[0][0], weights) and results[0][1] == loss for weights, loss in results[1:])


def test_saving_dicts(tmp_path: Path) -> None:
    given = [{"messages": [ASKED, ANSWERED], "topic": "animals"}]
    save_records(tmp_path / "x.jsonl", given)
    (record,) = load_records(tmp_path / "x.jsonl")
    assert as_dicts([record]) == given


def test_a_given_dict_stays_as_it_is() -> None:
    given = {"messages": [ASKED, ANSWERED], "topic": "animals"}
    (record,) = given_records([given])
    assert record.source == "records[0]" and record.extra == {"topic": "animals"} and len(given) == 2


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ("data.jsonl", r"not a path: read them with lk.load_records\('data.jsonl'\)"),
        (Path("data.jsonl"), r"load_records\('data.jsonl'\)"),
        (None, "a list of records is expected, not a NoneType"),
        ({"messages": [ASKED, ANSWERED]}, "a list of records is expected, not a dict"),
        (conversations(1)[0], "a list of records is expected, not a Record"),
        (["hello"], r'records\[0\]: expected an object with "messages", found a string'),
        ([[ASKED, ANSWERED]], r'records\[0\]: expected an object with "messages", found a list'),
        ([{"prompt": "a", "completion": "b"}], r'records\[0\]: the key "messages" is missing; found "prompt"'),
        ([{"conversations": [ASKED]}], "did you mean 'messages' where it says 'conversations'"),
        ([{"messages": [ASKED]}], "there is no assistant turn"),
        (
            [*conversations(1), {"messages": [{"role": "human", "content": "x"}, ANSWERED]}, {"messages": []}],
            r"records\[1\]: message 1 has the unknown role \"human\".*\n.*records\[2\]: \"messages\" is empty",
        ),
    ],
    ids=str,
)
def test_what_is_no_record(records: Any, message: str, tmp_path: Path) -> None:
    model = adapted()
    before = [parameter.clone() for parameter in adapter_parameters(model)]
    with pytest.raises(DataError, match=message):
        train(model, small_tokenizer(tmp_path), records, SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(before, adapter_parameters(model), strict=True))


def test_a_tokenizer_of_another_library(tmp_path: Path) -> None:
    small_tokenizer(tmp_path)
    other: Any = Backend.from_file(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        ConfigError, match=r"the tokenizer is a Tokenizer, not lorakit's: load it with lk.load_tokenizer"
    ):
        train(adapted(), other, conversations(2), SETTINGS)
