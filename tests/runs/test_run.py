"""A run from recipe to report on a small model: what it writes, how it is read back, what its failures leave."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from made import conversations

from lorakit import generate, load_adapter, load_model, load_records, load_tokenizer, save_records
from lorakit.adapters import lora_layers
from lorakit.data import Message, Record
from lorakit.errors import CheckpointError, ConfigError, DataError
from lorakit.evaluation import choose_examples, prompted_messages
from lorakit.models import chat_template
from lorakit.runs import load_recipe
from lorakit.runs.chat import Chat
from lorakit.runs.run import evaluate_run, load_run, train_run
from lorakit.training import trainer

FILES = {
    "recipe.yaml",
    "chat.json",
    "adapter",
    "train.jsonl",
    "predictions.jsonl",
    "metrics.json",
    "report.html",
    "report.md",
}


def run(*overrides: str, resume: bool = False) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    return train_run(load_recipe("recipe.yaml", overrides), said.append, resume), said


def measured(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: metrics[key] for key in ("base_prompted", "tuned", "verdict", "counts", "model")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_everything_is_written_and_says_the_same(workshop: Path) -> None:
    metrics, said = run()
    assert {path.name for path in (workshop / "run").iterdir()} == FILES
    assert json.loads((workshop / "run" / "metrics.json").read_text()) == metrics
    assert metrics["counts"].items() >= {"train": 8, "eval": 3, "steps": 4}.items()
    steps = [json.loads(line) for line in (workshop / "run" / "train.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4] and "eval_loss" in steps[-1]
    assert metrics["counts"]["tokens"] == sum(step["tokens"] for step in steps)
    assert set(metrics["tuned"]) == {"exact_match", "perplexity_general", "intervals"}
    assert metrics["best"] == {"exact_match": 1.0}
    assert metrics["seconds"].keys() >= {"load", "train", "evaluate_base", "evaluate_tuned", "total"}
    assert metrics["peak_rss_mb"] > 50 and metrics["versions"]["torch"] == torch.__version__
    assert load_recipe("run/recipe.yaml") == load_recipe("recipe.yaml")
    assert said[0] == "data: 8 to train on, 3 held out"
    assert any("adapter 'default' on 14 layers" in line for line in said)


def test_predictions_are_what_the_two_models_say(workshop: Path) -> None:
    run()
    rows = [json.loads(line) for line in (workshop / "run" / "predictions.jsonl").read_text().splitlines()]
    model, tok = load_model("model", dtype=torch.float32), load_tokenizer("model")
    records = load_records("eval.jsonl")
    assert [row["reference"] for row in rows] == [record.messages[-1].content for record in records]
    short = [[record.as_dicts()[0]] for record in records]
    assert [row["messages"] for row in rows] == short
    examples = choose_examples(load_records("train.jsonl"), 1)
    strong = [prompted_messages(record.messages, "Repeat the question.", examples) for record in records]
    assert [row["base"] for row in rows] == generate(model, tok, strong, 6)
    load_adapter(model, "run/adapter")
    assert [row["tuned"] for row in rows] == generate(model, tok, short, 6)
    assert [row["base"] for row in rows] != [row["tuned"] for row in rows]


def test_the_same_recipe_gives_the_same_run(workshop: Path) -> None:
    first, _ = run()
    second, _ = run("output=again")
    assert measured(first) == measured(second)
    adapters = [(workshop / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "again")]
    assert adapters[0] == adapters[1]
    third, _ = run("output=third", "seed=1")
    assert (workshop / "third" / "adapter" / "adapter_model.safetensors").read_bytes() != adapters[0]
    assert third["counts"]["steps"] == 4


def test_resuming_a_finished_run_changes_nothing(workshop: Path) -> None:
    run("train.checkpoint_every=2")
    adapter, log = contents(workshop / "run" / "adapter"), (workshop / "run" / "train.jsonl").read_bytes()
    metrics, _ = run("train.checkpoint_every=2", resume=True)
    assert contents(workshop / "run" / "adapter") == adapter
    assert (workshop / "run" / "train.jsonl").read_bytes() == log
    assert metrics["counts"]["steps"] == 4


@pytest.mark.parametrize("quant_type", ["nf4", "null"])
def test_without_evaluation_there_are_counts_alone(quant_type: str, workshop: Path) -> None:
    metrics, _ = run("eval=null", "data.eval=null", f"model.quant_type={quant_type}")
    assert "tuned" not in metrics and metrics["counts"]["eval"] == 0
    assert {path.name for path in (workshop / "run").iterdir()} == {
        "recipe.yaml",
        "chat.json",
        "adapter",
        "train.jsonl",
        "metrics.json",
    }
    with pytest.raises(ConfigError, match="no held-out records"):
        evaluate_run(workshop / "run")


def test_part_of_the_data_can_be_held_out(workshop: Path) -> None:
    metrics, said = run("data.eval=null", "data.eval_fraction=0.25")
    assert (metrics["counts"]["train"], metrics["counts"]["eval"]) == (6, 2)
    assert not any("warning" in line for line in said)


def test_a_question_on_both_sides_is_noted(workshop: Path) -> None:
    save_records(workshop / "eval.jsonl", [*conversations(2, start=20), conversations(1)[0]])
    metrics, said = run()
    assert len(metrics["data"]["notes"]) == 1
    assert any("warning" in line and "eval.jsonl:3" in line for line in said)


class TestEvaluatingAgain:
    def test_it_gives_the_same_numbers(self, workshop: Path) -> None:
        first, _ = run()
        assert measured(evaluate_run(workshop / "run", lambda _: None)) == measured(first)

    def test_a_run_that_was_moved_is_rewritten_where_it_is(self, workshop: Path) -> None:
        first, _ = run()
        (workshop / "run").rename(workshop / "moved")
        for name in ("metrics.json", "predictions.jsonl", "report.html", "report.md"):
            (workshop / "moved" / name).unlink()
        assert measured(evaluate_run(workshop / "moved", lambda _: None)) == measured(first)
        assert {path.name for path in (workshop / "moved").iterdir()} == FILES
        assert not (workshop / "run").exists()

    def test_a_log_that_a_kill_cut_off_is_read_to_there(self, workshop: Path) -> None:
        run()
        with (workshop / "run" / "train.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')
        assert evaluate_run(workshop / "run", lambda _: None)["counts"]["steps"] == 4

    def test_what_is_missing_is_named(self, workshop: Path) -> None:
        run("eval.metrics=[exact_match]")
        with pytest.raises(CheckpointError, match=r"model is not the folder of a run: it has no recipe\.yaml"):
            evaluate_run(workshop / "model")
        shutil.move("run/adapter", "elsewhere")
        with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
            evaluate_run(workshop / "run", lambda _: None)
        Path("eval.jsonl").unlink()
        with pytest.raises(DataError, match=r"eval\.jsonl"):
            evaluate_run(workshop / "run", lambda _: None)


class TestFailures:
    @pytest.mark.parametrize(
        ("file", "line", "message"),
        [
            ("train.jsonl", '{"messages": [}', r"train\.jsonl:9: not valid JSON"),
            ("eval.jsonl", '{"messages": []}', r"eval\.jsonl:4: .*empty"),
        ],
    )
    def test_broken_data_leave_nothing(self, file: str, line: str, message: str, workshop: Path) -> None:
        with (workshop / file).open("a") as opened:
            opened.write(line + "\n")
        with pytest.raises(DataError, match=message):
            run()
        assert not (workshop / "run").exists()

    def test_a_held_out_record_without_an_answer_is_found_before_training(self, workshop: Path) -> None:
        record = conversations(1, start=30)[0]
        turned = type(record)((*record.messages, Message("user", "and?")), record.source)
        save_records(workshop / "eval.jsonl", [turned])
        with pytest.raises(DataError, match="the last message is from 'user'"):
            run()
        assert not (workshop / "run").exists()

    def test_a_target_that_matches_nothing_leaves_nothing(self, workshop: Path) -> None:
        with pytest.raises(ValueError, match="did you mean 'q_proj'"):
            run("lora.target_modules=[q_porj]")
        assert not (workshop / "run").exists()

    def test_a_conversation_that_is_too_long_leaves_no_adapter(self, workshop: Path) -> None:
        with pytest.raises(DataError, match="max_length is 20"):
            run("data.max_length=20")
        assert not (workshop / "run" / "adapter").exists()


class TestTalking:
    def test_a_run_is_loaded_with_or_without_its_adapter(self, workshop: Path) -> None:
        run()
        tuned, tok, recipe = load_run(workshop / "run")
        base, _, _ = load_run(workshop / "run", adapted=False)
        assert len(lora_layers(tuned)) == 14 and not lora_layers(base)
        assert recipe.title == "small talk" and tok.encode("x")

    def test_a_chat_keeps_its_turns(self, workshop: Path) -> None:
        run()
        chat = Chat(workshop / "run")
        assert chat.messages == [] and "adapter" in chat.description
        chat.ask("a?")
        chat.answer("b")
        assert [message["role"] for message in chat.ask("c?")] == ["user", "assistant", "user"]

    def test_a_run_keeps_its_datas_system_prompt(self, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save_records(workshop / "train.jsonl", with_system("Be brief.", conversations(8)))
        run("eval=null", f"model.path={workshop / 'model'}")
        save_records(workshop / "train.jsonl", with_system("Be long.", conversations(8)))
        (workshop / "elsewhere").mkdir()
        (workshop / "run").rename(workshop / "moved")
        monkeypatch.chdir(workshop / "elsewhere")
        for folder in (Path("../moved"), workshop / "moved"):
            assert Chat(folder).messages == [{"role": "system", "content": "Be brief."}]
            assert Chat(folder, adapted=False).messages == [{"role": "system", "content": "Be brief."}]
        (workshop / "train.jsonl").unlink()
        assert Chat(workshop / "moved").messages == [{"role": "system", "content": "Be brief."}]
        assert Chat(workshop / "moved", system="").messages == []
        assert Chat(workshop / "moved", system="Sing.").messages == [{"role": "system", "content": "Sing."}]

    def test_a_run_that_keeps_none_reads_it_from_the_data(self, workshop: Path) -> None:
        run("eval=null")
        save_records(workshop / "train.jsonl", with_system("Be brief.", conversations(2)))
        assert Chat(workshop / "run").messages == []  # those it was trained on had none
        (workshop / "run" / "chat.json").unlink()
        assert Chat(workshop / "run").messages == [{"role": "system", "content": "Be brief."}]
        (workshop / "train.jsonl").unlink()
        assert Chat(workshop / "run").messages == []

    def test_a_base_with_a_relative_path_is_looked_for_here(
        self, workshop: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run("eval=null")
        (workshop / "elsewhere").mkdir()
        monkeypatch.chdir(workshop / "elsewhere")
        with pytest.raises(
            CheckpointError, match=r"recipe.yaml: model.path is 'model', .* relative to the folder where"
        ):
            Chat(workshop / "run")

    @pytest.mark.parametrize("text", ["", "[]", '{"system": '])
    def test_a_broken_file_is_named(self, text: str, workshop: Path) -> None:
        run("eval=null")
        (workshop / "run" / "chat.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"chat\.json"):
            Chat(workshop / "run")


class TestFigures:
    def test_what_is_not_finite_is_null(self, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lorakit.runs.evaluating.perplexity", lambda model, tok, text: float("inf"))
        metrics, _ = run()
        assert metrics["tuned"]["perplexity_general"] is None and metrics["verdict"]["helped"] is False
        text = (workshop / "run" / "metrics.json").read_text()
        assert "Infinity" not in text and "NaN" not in text and json.loads(text) == metrics
        assert "not finite" in (workshop / "run" / "report.md").read_text()

    @pytest.mark.parametrize(
        ("base_prompt", "given", "heading"),
        [
            ("{examples: 0}", "Both got the same short prompt", "Base, same prompt"),
            ("{examples: 1}", "a strong prompt with 1 worked example,", "Base, strong prompt"),
            ("{examples: 0, instructions: Repeat.}", "a strong prompt with instructions,", "Base, strong prompt"),
            (
                "{examples: 2, instructions: Repeat.}",
                "a strong prompt with instructions and 2 worked examples,",
                "Base, strong prompt",
            ),
        ],
    )
    def test_the_report_says_what_the_base_was_given(
        self, base_prompt: str, given: str, heading: str, workshop: Path
    ) -> None:
        run(f"eval.base_prompt={base_prompt}")
        for name in ("report.md", "report.html"):
            text = (workshop / "run" / name).read_text()
            assert given in text and heading in text
            assert "strong" in given or "strong prompt" not in text


def with_system(text: str, records: list[Record]) -> list[Record]:
    return [Record((Message("system", text), *record.messages), record.source) for record in records]


def test_the_day_of_a_dated_template_is_kept(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads(Path("model/tokenizer_config.json").read_text())
    config["chat_template"] = "Today is {{ strftime_now('%d %b %Y') }}\n" + config["chat_template"]
    Path("model/tokenizer_config.json").write_text(json.dumps(config))

    def it_is(day: int) -> None:
        now = classmethod(lambda cls, tz=None: cls(2026, 11, day))
        monkeypatch.setattr(chat_template, "datetime", type("Clock", (datetime.datetime,), {"now": now}))

    it_is(27)
    first, said = run("train.checkpoint_every=2")
    assert "date in the conversations: 2026-11-27" in said
    assert load_recipe("run/recipe.yaml").data.date == datetime.date(2026, 11, 27)
    with monkeypatch.context() as patched:
        steps = iter([trainer.take_step] * 3)  # it stops at the fourth
        patched.setattr(trainer, "take_step", lambda *given: next(steps)(*given))
        with pytest.raises((StopIteration, RuntimeError)):
            run("train.checkpoint_every=2", "output=stopped")
    it_is(28)
    resumed, said = run("train.checkpoint_every=2", "output=stopped", resume=True)
    assert "date in the conversations: 2026-11-27" in said and measured(resumed) == measured(first)
    assert load_run(Path("run"))[1].date == datetime.date(2026, 11, 27)
    assert measured(evaluate_run(Path("run"))) == measured(first)
    chosen, said = run("data.date=2026-11-27", "output=again")  # YAML reads a date
    assert measured(chosen) == measured(first)
    _, said = run("output=other")
    assert "date in the conversations: 2026-11-28" in said


def test_a_chat_has_the_tools_of_the_data(workshop: Path) -> None:
    config = json.loads(Path("model/tokenizer_config.json").read_text())
    config["chat_template"] = "{% if tools %}{{ tools | tojson }}{% endif %}" + config["chat_template"]
    Path("model/tokenizer_config.json").write_text(json.dumps(config))
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    for file in ("train.jsonl", "eval.jsonl"):
        save_records(file, [Record(record.messages, record.source, {"tools": tools}) for record in load_records(file)])
    run()
    chat = Chat(Path("run"))
    asked = chat.ask("Hi")
    assert asked == [{"role": "user", "content": "Hi"}] and asked.tools == tools
    assert chat.tok.render_chat(asked, True).startswith(json.dumps(tools))
