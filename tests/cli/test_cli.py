"""The command line from end to end: real runs of a small model, and errors of one message and no traceback."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from made import RECIPE, conversations
from typer.testing import CliRunner

from lorakit import generate, load_model, load_tokenizer, merge_adapter, save_adapter, save_records
from lorakit.cli import main
from lorakit.cli.app import app
from lorakit.data import Message
from lorakit.errors import LorakitError
from lorakit.runs import load_recipe
from lorakit.runs.run import load_run

COMMAND = [sys.executable, "-c", "from lorakit.cli import main; main()"]


def lorakit(*arguments: str, typed: str | None = None) -> str:
    """Run a command that succeeds; return what it prints."""
    result = CliRunner().invoke(app, arguments, input=typed)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def fails(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that fails; return the one message it prints to stderr."""
    monkeypatch.setattr(sys, "argv", ["lorakit", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    message = capsys.readouterr().err
    assert caught.value.code == 1
    assert message.startswith("error: ") and "Traceback" not in message
    return message


def test_a_run_from_training_to_talking(workshop: Path) -> None:
    printed = lorakit("train", "recipe.yaml", "--set", "train.max_steps=3", "--set", "title=A [b]:key:[/b] title")
    assert "adapter 'default' on 14 layers" in printed and "exact_match" in printed
    assert "base, strong prompt" in printed and "perplexity_general" in printed
    assert re.search(r"\d+ s, peak memory [\d,]+ MiB; report: run/report\.html", printed)
    assert "lorakit chat run " in printed and "rm -r run/adapter " in printed
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["counts"]["steps"] == 3 and metrics["title"] == "A [b]:key:[/b] title"
    assert metrics["verdict"]["sentence"] in printed

    Path("run/metrics.json").unlink()
    again = lorakit("eval", "run")
    assert metrics["verdict"]["sentence"] in again
    assert json.loads(Path("run/metrics.json").read_text())["tuned"] == metrics["tuned"]

    for options in ([], ["--base"]):
        talk = lorakit("chat", "run", *options, "--max-new-tokens", "5", typed="fox?\nagain\n\n")
        assert talk.count("> ") == 3
        assert ("without adapter" in talk) == bool(options)
    assert lorakit("chat", "run", typed="").count("> ") == 1


def test_generate_answers_each_prompt_as_a_chat_would(workshop: Path) -> None:
    lorakit("train", "recipe.yaml", "--set", "eval=null")
    short = ["--max-new-tokens", "5"]
    for options in ([], ["--base"]):
        alone = [lorakit("generate", "run", prompt, *short, *options) for prompt in ("fox?", "dog?")]
        assert all(
            answer.strip("\n") in lorakit("chat", "run", *short, *options, typed=f"{prompt}\n\n")
            for prompt, answer in zip(("fox?", "dog?"), alone, strict=True)
        )
        assert lorakit("generate", "run", "fox?", "dog?", *short, *options) == "".join(alone)
    lines = lorakit("generate", "run", "fox?", "dog?", *short, "--json").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["fox?", "dog?"]
    assert [json.loads(line)["answer"] + "\n" for line in lines] == [
        lorakit("generate", "run", prompt, *short) for prompt in ("fox?", "dog?")
    ]


def test_as_a_command_with_its_output_piped(workshop: Path) -> None:
    arguments = ["train", "recipe.yaml", "--set", "eval=null", "--set", "train.progress=true"]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "train 4/4  loss " in done.stdout
    assert "\x1b" not in done.stdout  # no colors in a pipe
    names = {"recipe.yaml", "chat.json", "adapter", "train.jsonl", "metrics.json"}
    assert {path.name for path in Path("run").iterdir()} == names


def test_an_answer_is_printed_as_it_is(workshop: Path) -> None:
    """No markup, no emoji, no line breaks: a model's answer may hold anything."""
    text = "[red] :smile: [/x] The quick brown fox jumps over the lazy dog, which does not mind; it does so every day."
    save_records(
        "train.jsonl", [type(r)((r.messages[0], Message("assistant", text)), r.source) for r in conversations(1)]
    )
    lorakit("train", "recipe.yaml", "--set", "eval=null", "--set", "train.max_steps=60", "--set", "lora.r=16")
    question = conversations(1)[0].messages[0].content
    model, tok, _ = load_run(Path("run"))
    answer = str(generate(model, tok, [{"role": "user", "content": question}], 120))
    assert "[red] :smile: [" in answer and len(answer) > 80  # learned well enough to try what a console might change
    assert answer in lorakit("chat", "run", "--max-new-tokens", "120", typed=question + "\n\n")


def test_paths_and_patterns_with_brackets_are_no_markup(workshop: Path) -> None:
    arguments = ["--set", "output=run[/x]", "--set", r"lora.target_modules='.*\.[qv]_proj'", "--set", "eval=null"]
    printed = lorakit("train", "recipe.yaml", *arguments)
    assert r".*\.[qv]_proj: 4 layers" in printed
    assert "lorakit chat 'run[/x]' " in printed and "rm -r 'run[/x]/adapter' " in printed
    lorakit("chat", "run[/x]", typed="")


class TestData:
    def test_show(self, workshop: Path) -> None:
        save_records(
            "odd.jsonl",
            [
                type(record)(
                    (record.messages[0], Message("assistant", f"[b]:key:[/b] {'long ' * 40}{i}")), record.source
                )
                for i, record in enumerate(conversations(4))
            ],
        )
        printed = lorakit("data", "show", "odd.jsonl", "--model", "model", "-n", "2")
        assert printed.count("⟦[b]:key:[/b] " + "long " * 40) == 2
        assert "odd.jsonl:1" in printed and "odd.jsonl:3" not in printed
        assert re.search(r"4 conversations, [\d,]+ tokens, [\d,]+ trained; median \d+, longest \d+", printed)
        assert "4 training and 0 evaluation records" in printed

    def test_build(self, workshop: Path) -> None:
        printed = lorakit("data", "build", "chatterbot", "--out", "data", "--seed", "1")
        assert "562" in printed
        assert {"train.jsonl", "eval.jsonl", "schema.json", "base_prompt.txt"} <= {
            p.name for p in Path("data").iterdir()
        }
        lorakit("data", "build", "chatterbot", "--out", "again", "--seed", "1")
        assert Path("data/train.jsonl").read_bytes() == Path("again/train.jsonl").read_bytes()


class TestErrors:
    @pytest.fixture(autouse=True)
    def quietly(self, workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.tools = {"monkeypatch": monkeypatch, "capsys": capsys}

    def test_unknown_keys_and_wrong_values_come_in_one_report(self) -> None:
        text = RECIPE.replace("  lr: 1e-2", "  learning_rate: 1e-2\n  betas: [0.9, 2]").replace("r: 4", "r: none")
        Path("recipe.yaml").write_text(text)
        message = fails("train", "recipe.yaml", **self.tools)
        line = text.splitlines().index("  learning_rate: 1e-2") + 1
        assert f"recipe.yaml:{line}: train.learning_rate: unknown key" in message
        assert "train.betas.1" in message and "lora.r" in message
        assert not Path("run").exists()

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["train", "recpie.yaml"], ["recpie.yaml: no such recipe", "did you mean 'recipe.yaml'"]),
            (["train", "."], ["is a folder, expected a recipe"]),
            (["train", "recipe.yaml", "--set", "train.lr"], ["override 'train.lr'", "key=value"]),
            (["train", "recipe.yaml", "--set", "train.lrr=1"], ["train.lrr", "did you mean 'lr'"]),
            (["train", "recipe.yaml", "--set", "train.lr=.inf"], ["train.lr"]),
            (["train", "recipe.yaml", "--set", "seed=99999999999999999999"], ["seed"]),
            (
                ["train", "recipe.yaml", "--set", "data.train=trian.jsonl"],
                ["trian.jsonl", "did you mean 'train.jsonl'"],
            ),
            (["train", "recipe.yaml", "--set", "model.path=smollm2-135m"], ["neither a folder nor a known model"]),
            (["train", "recipe.yaml", "--set", "lora.target_modules=[q_porj]"], ["did you mean 'q_proj'"]),
            (["train", "recipe.yaml", "--set", "lora.rank_pattern={'(': 2}"], ["not a regular expression"]),
            (["train", "recipe.yaml", "--set", "model.device=gpu"], ["model.device: 'gpu' is no device", "'cuda'"]),
            (["train", "recipe.yaml", "--set", "model.device=cuda:77"], ["model.device is 'cuda:77'", "finds cpu"]),
            (["train", "recipe.yaml", "--set", "train.learning_rate=1"], ["unknown key; here it is called 'lr'"]),
            (["train", "recipe.yaml", "--set", "output=."], ["data.train is train.jsonl, where the run writes"]),
            (["eval", "nowhere"], ["nowhere is not the folder of a run"]),
            (["chat", "model"], ["model is not the folder of a run"]),
            (["data", "build", "chaterbot", "--out", "x"], ["did you mean 'chatterbot'"]),
            (["data", "show", "nothing.jsonl", "--model", "model"], ["nothing.jsonl"]),
            (["data", "show", "train.jsonl", "--model", "modle"], ["modle"]),
            (["data", "show", "train.jsonl", "--model", "model", "--max-length", "3"], ["train.jsonl:1", "max_length"]),
        ],
    )
    def test_what_is_wrong_is_said_and_nothing_is_written(self, arguments: list[str], words: list[str]) -> None:
        before = sorted(Path().rglob("*"))
        message = fails(*arguments, **self.tools)
        assert all(word in message for word in words), message
        assert sorted(Path().rglob("*")) == before

    def test_broken_data_are_named_with_their_lines(self) -> None:
        with open("train.jsonl", "a") as file:
            file.write('{"messages": [\n\n{"conversations": []}\n')
        message = fails("train", "recipe.yaml", **self.tools)
        assert "train.jsonl:9: not valid JSON" in message
        assert "train.jsonl:11: " in message and "did you mean 'messages'" in message
        assert not Path("run").exists()

    def test_a_broken_adapter(self) -> None:
        lorakit("train", "recipe.yaml", "--set", "eval=null", "--set", "train.max_steps=1")
        file = Path("run/adapter/adapter_model.safetensors")
        file.write_bytes(file.read_bytes()[:-1])
        assert str(file) in fails("chat", "run", "--system", "x", **self.tools)

    def test_an_empty_run_cannot_be_evaluated(self) -> None:
        lorakit("train", "recipe.yaml", "--set", "eval=null", "--set", "data.eval=null", "--set", "train.max_steps=1")
        assert "no held-out records" in fails("eval", "run", **self.tools)

    @pytest.mark.parametrize(
        "arguments", [["trian"], ["train"], ["train", "recipe.yaml", "--nope"], ["data", "build", "x"]]
    )
    def test_usage_errors_exit_with_2(self, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["lorakit", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2

    @pytest.mark.parametrize(
        "arguments", [["--help"], ["train", "--help"], ["data", "--help"], ["data", "show", "--help"]]
    )
    def test_help(self, arguments: list[str]) -> None:
        assert "Usage" in lorakit(*arguments)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_says_how_to_go_on_and_resume_goes_on(workshop: Path) -> None:
    settings = ["--set", "train.max_steps=100000", "--set", "train.checkpoint_every=5", "--set", "eval=null"]
    command = [*COMMAND, "train", "recipe.yaml", *settings]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    log, deadline = Path("run/train.jsonl"), time.monotonic() + 60
    try:
        while (not log.is_file() or log.read_bytes().count(b"\n") < 6) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert message == "interrupted; go on from the last checkpoint with the same command and --resume\n"
    assert not Path("run/adapter").exists()
    short = [part.replace("100000", "12") for part in settings]
    assert "other settings" in str(CliRunner().invoke(app, ["train", "recipe.yaml", *short, "--resume"]).exception)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_in_other_commands_says_nothing_of_resuming(workshop: Path) -> None:
    lorakit("train", "recipe.yaml", "--set", "eval=null", "--set", "train.max_steps=1")
    process = subprocess.Popen(
        [*COMMAND, "chat", "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert "an empty line ends" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, message) == (130, "interrupted\n")


def test_a_second_run_into_a_folder(workshop: Path) -> None:
    quick = ("--set", "eval=null", "--set", "train.max_steps=2")
    lorakit("train", "recipe.yaml", *quick)
    for options in ([], ["--resume"], ["--resume", "--overwrite"]):
        result = CliRunner().invoke(app, ["train", "recipe.yaml", *quick, "--set", "train.lr=0.5", *options])
        assert isinstance(result.exception, LorakitError), result.output
    assert load_recipe("run/recipe.yaml").train.lr == 1e-2
    lorakit("train", "recipe.yaml", *quick, "--set", "train.lr=0.5", "--overwrite")
    assert load_recipe("run/recipe.yaml").train.lr == 0.5
    lorakit("train", "run/recipe.yaml", "--overwrite")


def test_the_printed_commands_can_be_pasted(workshop: Path) -> None:
    printed = lorakit("train", "recipe.yaml", "--set", "output=my run; $HOME", "--set", "eval=null")
    commands = [line.strip() for line in printed.splitlines() if line.startswith("  ")]
    assert "rm -r 'my run; $HOME/adapter'" in {line.partition("    ")[0] for line in commands}
    assert "lorakit chat 'my run; $HOME'" in {line.partition("    ")[0] for line in commands}


def test_the_base_model_and_a_plain_adapter_can_be_used_without_the_command_line(workshop: Path) -> None:
    lorakit("train", "recipe.yaml", "--set", "eval=null", "--set", "train.max_steps=1")
    model, _, _ = load_run(Path("run"))
    save_adapter(model, "copy")
    assert (
        Path("copy/adapter_model.safetensors").read_bytes()
        == Path("run/adapter/adapter_model.safetensors").read_bytes()
    )
    assert load_model("model").config.vocab_size >= load_tokenizer("model").vocab_size


def test_merging(workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lorakit("train", "recipe.yaml", "--set", "eval=null")
    printed = lorakit("merge", "run", "--out", "merged", "--layers", "--shard-size", "40kB")
    assert "into 14 layers, onto " in printed and "of the update survived" in printed and "merged: written" in printed
    merged, (adapted, tok, _) = load_model("merged", quant_type=None, dtype=torch.float32), load_run(Path("run"))
    merge_adapter(adapted)
    assert generate(merged, tok, "fox?", max_new_tokens=5) == generate(adapted, tok, "fox?", max_new_tokens=5)
    assert len(list(Path("merged").glob("*.safetensors"))) > 1 and load_tokenizer("merged").vocab_size == tok.vocab_size
    lorakit("merge", "run/adapter", "--base", "model", "--out", "small", "--quantize", "nf4", "--block-size", "32")
    config = json.loads(Path("small/config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    message = fails("merge", "run", "--out", "merged", monkeypatch=monkeypatch, capsys=capsys)
    assert "merged exists already" in message
    message = fails("merge", "model", "--out", "new", monkeypatch=monkeypatch, capsys=capsys)
    assert "model holds no adapter" in message and not Path("new").exists()
