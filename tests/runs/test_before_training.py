"""What is known before the first step is told before it: nothing that was there from the beginning ends a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made import CHATML, conversations

from lorakit import save_records
from lorakit.data import Message, Record
from lorakit.errors import ConfigError, DataError, LorakitError
from lorakit.runs import load_recipe
from lorakit.runs.recipe import Recipe
from lorakit.runs.run import evaluate_run, load_run, train_run

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def refused(*overrides: str, error: type[LorakitError] = DataError) -> str:
    """Carry out a run that is refused before it has written anything; return the message."""
    with pytest.raises(error) as caught:
        train_run(load_recipe("recipe.yaml", overrides), lambda line: None)
    assert not Path("run").exists()
    return str(caught.value)


def with_turns(record: Record, *messages: Message) -> Record:
    return Record((*record.messages, *messages), record.source)


def template(text: str) -> None:
    path = Path("model/tokenizer_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": text}))


class TestQuestions:
    def test_every_training_record_that_cannot_be_an_example(self, workshop: Path) -> None:
        records = conversations(8)
        for index in (2, 5):
            records[index] = with_turns(records[index], Message("user", "thanks"))
        save_records("train.jsonl", records)
        message = refused()
        assert "train.jsonl:3: the last message is from 'user'" in message and "train.jsonl:6: " in message
        assert "base_prompt.examples: 0 uses none" in message
        assert "tuned" in train_run(load_recipe("recipe.yaml", ["eval.base_prompt.examples=0"]), lambda line: None)

    def test_every_held_out_record_without_an_answer(self, workshop: Path) -> None:
        records = [with_turns(record, Message("user", "and?")) for record in conversations(3, start=20)]
        save_records("eval.jsonl", records)
        message = refused()
        assert all(f"eval.jsonl:{line}: the last message is from 'user'" in message for line in (1, 2, 3))

    def test_those_beyond_the_limit_are_not_asked(self, workshop: Path) -> None:
        records = conversations(3, start=20)
        save_records("eval.jsonl", [*records, with_turns(records[0], Message("user", "and?"))])
        assert "tuned" in train_run(load_recipe("recipe.yaml", ["eval.limit=3"]), lambda line: None)

    @pytest.mark.parametrize(("side", "examples"), [("tuned", 0), ("base", 1)])
    def test_a_prompt_that_leaves_no_room_in_the_context(self, side: str, examples: int, workshop: Path) -> None:
        save_records("eval.jsonl", [*conversations(2, start=20), Record(
            (Message("user", "why " * 100), Message("assistant", "so")), "x")])  # fmt: skip
        room = 1024 - len_of_prompt("why " * 100)
        settings = (f"eval.base_prompt={{examples: {examples}}}", f"eval.max_new_tokens={room + (side == 'tuned')}")
        message = refused(*settings)
        assert f"eval.jsonl:3: the prompt of the {side} model has" in message and "the context of 1024" in message
        fitting = ("eval.base_prompt={examples: 0}", f"eval.max_new_tokens={room}", "eval.limit=3")
        assert "tuned" in train_run(load_recipe("recipe.yaml", fitting), lambda line: None)

    def test_instructions_for_a_template_that_refuses_them(self, workshop: Path) -> None:
        template(NO_SYSTEM + CHATML)
        message = refused()
        assert "eval.jsonl:1: the prompt of the base model" in message and "System role not supported" in message
        without = ["eval.base_prompt={examples: 1}"]
        assert "tuned" in train_run(load_recipe("recipe.yaml", without), lambda line: None)

    def test_a_template_that_wants_roles_in_turns(self, workshop: Path) -> None:
        template(
            "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
        )
        assert "roles must alternate" in refused()

    @pytest.mark.parametrize("key", ["train", "eval"])
    def test_a_token_without_a_row(self, key: str, workshop: Path) -> None:
        shrink_vocabulary(389)  # the tokenizer's 389 tokens have a row each
        records = [*conversations(2, start=30), Record((Message("user", "x"), Message("assistant", "a <new>")), "x")]
        save_records(f"{key}.jsonl", records)
        message = refused("eval=null")
        assert "the model's embedding has 389 rows" in message and f"{key}.jsonl:3 (token 389)" in message

    @pytest.mark.parametrize("what", ["instructions", "general text"])
    def test_a_token_without_a_row_in_what_is_only_evaluated(self, what: str, workshop: Path) -> None:
        shrink_vocabulary(389)
        if what == "instructions":
            message = refused("eval.base_prompt.instructions='<new> question'")
            assert "eval.jsonl:1: the prompt of the base model has the token 389" in message
        else:
            Path("general.txt").write_text("water <new> boils")
            assert "general_text general.txt has the token 389; the model's embedding has 389 rows" in refused()

    @pytest.mark.parametrize("text", ["", " \n", "a"])
    def test_a_general_text_without_text(self, text: str, workshop: Path) -> None:
        Path("general.txt").write_text(text)
        assert "general_text general.txt" in refused()

    def test_a_schema_that_refers_to_nothing_where_no_reference_leads(self, workshop: Path) -> None:
        schema = {"anyOf": [{"type": "object"}, {"items": {"$ref": "#/$defs/gone"}}]}
        Path("schema.json").write_text(json.dumps(schema))
        save_records("eval.jsonl", [Record((Message("user", "x"), Message("assistant", "{}")), "x")])
        metrics = "eval.metrics=[{kind: json_schema, schema_file: schema.json}]"
        assert "refers to '/$defs/gone', which it does not hold" in refused(metrics, error=ConfigError)

    def test_references_that_do_not_fit_a_metric_are_named_with_their_lines(self, workshop: Path) -> None:
        message = refused("eval.metrics=[{kind: json_field_equals, field: topic}]")
        assert "eval.jsonl:1: 'topic_accuracy' needs a reference" in message and "eval.jsonl:3: " in message

    def test_also_where_a_finished_run_is_evaluated_again(self, workshop: Path) -> None:
        train_run(load_recipe("recipe.yaml"), lambda line: None)
        before = Path("run/metrics.json").read_bytes()
        template(NO_SYSTEM + CHATML)
        with pytest.raises(DataError, match="System role not supported"):
            evaluate_run(Path("run"), lambda line: None)
        assert Path("run/metrics.json").read_bytes() == before


class TestNamesAndDevices:
    def test_names_that_no_file_could_hold(self, workshop: Path) -> None:
        values: dict[str, Any] = {"title": "x", "model": {"path": "model"}, "output": Path("run")}
        for key, data in (("data.train", Path("t\udcff.jsonl")), ("output", Path("train.jsonl"))):
            output = Path("o\udcff") if key == "output" else Path("run")
            with pytest.raises(ConfigError, match=f"{key} is .*not UTF-8"):
                Recipe(**values | {"output": output, "data": {"train": data}})

    @pytest.mark.parametrize("output", ["recipe.yaml", "recipe.yaml/run", '"a\\0b"', "x" * 300])
    def test_an_output_that_cannot_be(self, output: str, workshop: Path) -> None:
        with pytest.raises(LorakitError, match="cannot write"):
            train_run(load_recipe("recipe.yaml", [f"output={output}"]), lambda line: None)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("gpu", "model.device: 'gpu' is no device; did you mean 'cuda'"),
            ("gpu:1", "did you mean 'cuda:1'"),
            ("cdua", "did you mean 'cuda'"),
            ("cuda:77", "model.device is 'cuda:77', which torch does not find on this machine; it finds cpu"),
            ("mps", "model.device is 'mps', which torch does not find on this machine"),
        ],
    )
    def test_a_device_that_is_not_here(self, name: str, message: str, workshop: Path) -> None:
        shrink_vocabulary(389)
        assert message in refused(f"model.device={name}", error=ConfigError)

    def test_a_run_from_another_machine(self, workshop: Path) -> None:
        train_run(load_recipe("recipe.yaml"), lambda line: None)
        path = Path("run/recipe.yaml")
        path.write_text(path.read_text().replace("device: cpu", "device: cuda:77"))
        (workshop / "model" / "model.safetensors").unlink()  # the device comes first
        for use in (load_run, evaluate_run):
            with pytest.raises(ConfigError, match=r"model\.device is 'cuda:77'"):
                use(Path("run"))


def len_of_prompt(text: str) -> int:
    from lorakit import load_tokenizer

    tok = load_tokenizer("model")
    return len(tok.encode(tok.render_chat([{"role": "user", "content": text}], add_generation_prompt=True)))


def shrink_vocabulary(rows: int) -> None:
    """Give the model so many rows, and the tokenizer one more token, "<new>"."""
    import tokenizers
    from made import small_config, small_decoder, write_checkpoint

    write_checkpoint(Path("model"), small_decoder(vocab_size=rows), small_config(vocab_size=rows))
    backend = tokenizers.Tokenizer.from_file("model/tokenizer.json")
    assert backend.get_vocab_size() == rows
    backend.add_tokens(["<new>"])
    backend.save("model/tokenizer.json")
