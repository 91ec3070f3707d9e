"""A run that was interrupted or killed goes on to the bit as if it had not been, or says why it cannot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import CHATML, SPECIAL, adapted, byte_level, conversations, make_tokenizer, small_decoder, small_tokenizer
from safetensors.torch import load_file
from small_training import CONVERSATIONS, config, interrupted, logged, same, timeless, values_of

from lorakit import (
    Decoder,
    LoraConfig,
    Tokenizer,
    TrainConfig,
    TrainResult,
    add_adapter,
    load_tokenizer,
    set_adapter,
    train,
)
from lorakit.errors import CheckpointError, TrainingError
from lorakit.models.tokenizer import tokenizer


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class TestResuming:
    def run(
        self, tok: Tokenizer, settings: TrainConfig, resume: bool = False, **lora: Any
    ) -> tuple[Decoder, TrainResult]:
        model = adapted(lora_dropout=0.2, **lora)
        return model, train(model, tok, CONVERSATIONS, settings, resume=resume)

    @given(at_pass=st.integers(2, 12), every=st.integers(1, 5))
    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_an_interruption_anywhere_leaves_no_trace(
        self, at_pass: int, every: int, tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        folder = tmp_path_factory.mktemp("run")
        whole, expected = self.run(tok, config())
        settings = config(output=folder, checkpoint_every=every, micro_batch_tokens=2048)
        if at_pass > 6:
            settings = settings.model_copy(update={"micro_batch_tokens": 40})  # several passes a step
            whole, expected = self.run(tok, settings.model_copy(update={"output": None}))
        interrupted(adapted(lora_dropout=0.2), tok, settings, at_pass)
        model, result = self.run(tok, settings, resume=True)
        assert same(values_of(model), values_of(whole))
        assert timeless(result.history) == timeless(expected.history)
        assert timeless(logged(folder)) == timeless(expected.history)
        assert (result.steps, result.tokens) == (expected.steps, expected.tokens)

    def test_after_kill_9(self, tok: Tokenizer, tmp_path: Path) -> None:
        settings = config(max_steps=100, output=tmp_path, checkpoint_every=7)
        script = (
            "import sys, pathlib\n"
            "from lorakit import train\n"
            "from made import adapted, small_tokenizer\n"
            "from small_training import CONVERSATIONS, config\n"
            "output = pathlib.Path(sys.argv[1])\n"
            "tok = small_tokenizer(pathlib.Path(sys.argv[2]))\n"
            "settings = config(max_steps=100, output=output, checkpoint_every=7)\n"
            "train(adapted(lora_dropout=0.2), tok, CONVERSATIONS, settings)\n"
        )
        tests = Path(__file__).parents[1]
        path = os.pathsep.join(map(str, [tests, tests / "training", *filter(None, sys.path)]))
        (tmp_path / "tok").mkdir()
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(tmp_path / "tok")], env=os.environ | {"PYTHONPATH": path}
        )
        deadline = time.monotonic() + 60
        log = tmp_path / "train.jsonl"
        while (not log.is_file() or log.read_bytes().count(b"\n") < 10) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert 10 <= len(log.read_text().splitlines()) < 100
        model, result = self.run(tok, settings, resume=True)
        whole, expected = self.run(tok, settings.model_copy(update={"output": None}))
        assert same(values_of(model), values_of(whole))
        assert timeless(result.history) == timeless(logged(tmp_path)) == timeless(expected.history)

    def test_what_a_kill_leaves_behind_is_passed_over(self, tok: Tokenizer, tmp_path: Path) -> None:
        settings = config(output=tmp_path, checkpoint_every=2)
        interrupted(adapted(lora_dropout=0.2), tok, settings, at_pass=4)
        half = tmp_path / "checkpoints" / ".step-000004.abc.part"
        half.mkdir()
        (half / "state.safetensors").write_bytes(b"half")
        with (tmp_path / "train.jsonl").open("a") as file:
            file.write('{"step": 4, "lo')
        model, _ = self.run(tok, settings, resume=True)
        assert same(values_of(model), values_of(self.run(tok, config())[0]))
        assert [row["step"] for row in logged(tmp_path)] == [1, 2, 3, 4, 5, 6]

    def test_a_finished_run_is_left_as_it_is(self, tok: Tokenizer, tmp_path: Path) -> None:
        settings = config(output=tmp_path, checkpoint_every=3)
        first = adapted(lora_dropout=0.2)
        result = train(first, tok, CONVERSATIONS, settings, CONVERSATIONS)
        second = adapted(lora_dropout=0.2)
        again = train(second, tok, CONVERSATIONS, settings, CONVERSATIONS, resume=True)
        assert same(values_of(first), values_of(second))
        assert again.history == result.history and again.eval_loss == result.eval_loss is not None

    @pytest.mark.parametrize("folder", ["new", None])
    def test_without_a_checkpoint_it_starts_anew_and_says_so(
        self, folder: str | None, tok: Tokenizer, tmp_path: Path
    ) -> None:
        with pytest.warns(UserWarning, match="nothing to resume: .*; training begins at step 1"):
            model, result = self.run(tok, config(output=tmp_path / folder if folder else None), resume=True)
        assert result.steps == 6 and same(values_of(model), values_of(self.run(tok, config())[0]))

    def test_steps_without_a_checkpoint_keep_their_log(self, tok: Tokenizer, tmp_path: Path) -> None:
        interrupted(adapted(lora_dropout=0.2), tok, config(output=tmp_path), at_pass=4)
        log = (tmp_path / "train.jsonl").read_bytes()
        for number in (1, 2):
            with pytest.warns(UserWarning, match=r"train.jsonl has steps, but there is no checkpoint .* kept as"):
                model, _ = self.run(tok, config(output=tmp_path), resume=True)
            assert (tmp_path / f"train.jsonl.{number}").read_bytes() == log
            log = (tmp_path / "train.jsonl").read_bytes()
        assert same(values_of(model), values_of(self.run(tok, config())[0]))

    def test_a_newer_one_that_is_broken_is_passed_over(self, tok: Tokenizer, tmp_path: Path) -> None:
        settings = config(output=tmp_path, checkpoint_every=2)
        interrupted(adapted(lora_dropout=0.2), tok, settings, at_pass=4)
        folder = tmp_path / "checkpoints"
        for name in ("step-000099", "step-000100", "step-old", "step-²"):
            (folder / name).mkdir()
        (folder / "step-000100" / "state.json").write_text("{}")
        model, _ = self.run(tok, settings, resume=True)
        assert same(values_of(model), values_of(self.run(tok, config())[0]))
        assert sorted(path.name for path in folder.iterdir()) == ["step-000006", "step-old", "step-²"]

    def test_the_steps_of_a_checkpoint_are_numbers(self, tok: Tokenizer, tmp_path: Path) -> None:
        settings = config(output=tmp_path, checkpoint_every=2)
        self.run(tok, settings)
        folder = tmp_path / "checkpoints"
        (folder / "step-000006").rename(folder / "step-1000000")
        (folder / "step-999999").mkdir()
        assert self.run(tok, settings, resume=True)[1].steps == 6

    def test_without_resume_it_starts_anew(self, tok: Tokenizer, tmp_path: Path) -> None:
        settings = config(output=tmp_path, checkpoint_every=2)
        interrupted(adapted(lora_dropout=0.2), tok, settings, at_pass=5)
        model, _ = self.run(tok, settings)
        assert same(values_of(model), values_of(self.run(tok, config())[0]))
        assert [row["step"] for row in logged(tmp_path)] == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize("change", ["lr", "seed", "batch_size", "max_steps", "data", "r", "lora_alpha", "dropout"])
    def test_a_checkpoint_of_another_run_is_refused(self, change: str, tok: Tokenizer, tmp_path: Path) -> None:
        settings = config(output=tmp_path, checkpoint_every=2)
        self.run(tok, settings)
        records, lora = list(CONVERSATIONS), {"lora_dropout": 0.2}
        if change == "data":
            records = conversations(10, start=1)
        elif change in ("r", "lora_alpha"):
            lora[change] = 5
        elif change == "dropout":
            lora["lora_dropout"] = 0.0
        else:
            settings = settings.model_copy(update={change: 7})
        model = adapted(**lora)
        before, log = values_of(model), (tmp_path / "train.jsonl").read_bytes()
        with pytest.raises(TrainingError, match="other settings, data or adapter") as caught:
            train(model, tok, records, settings, resume=True)
        named = {
            "data": "the training records: not the same",
            "dropout": "lora_dropout of adapter",
            "r": "r of adapter",
        }
        assert named.get(change, change) in str(caught.value)
        assert same(values_of(model), before)
        assert (tmp_path / "train.jsonl").read_bytes() == log

    @pytest.mark.parametrize("change", ["weight", "bias", "rope_theta", "4 bits", "another adapter"])
    def test_a_checkpoint_on_another_base_is_refused(self, change: str, tok: Tokenizer, tmp_path: Path) -> None:
        def model(changed: bool) -> Decoder:
            if change == "4 bits":
                return adapted(quantized=changed)
            made = adapted() if change != "rope_theta" or not changed else _adapted_with(rope_theta=5000.0)
            if changed and change == "weight":
                made.get_submodule("model.layers.1.mlp.up_proj.base_layer").weight.data.mul_(1.01)
            if changed and change == "bias":
                made.model.norm.weight.data[0] += 1
            if change == "another adapter":
                torch.manual_seed(1 + changed)
                add_adapter(made, LoraConfig(r=2, init_lora_weights=False), "other", trained=False)
                set_adapter(made, "default")
            return made

        settings = config(output=tmp_path, checkpoint_every=2)
        train(model(False), tok, CONVERSATIONS, settings)
        log = (tmp_path / "train.jsonl").read_bytes()
        with pytest.raises(TrainingError, match="the base model: not the same"):
            train(model(True), tok, CONVERSATIONS, settings, resume=True)
        assert (tmp_path / "train.jsonl").read_bytes() == log
        assert train(model(False), tok, CONVERSATIONS, settings, resume=True).steps == 6

    @pytest.mark.parametrize("change", ["progress", "eval_every", "checkpoint_every"])
    def test_what_does_not_change_the_numbers_may_change(self, change: str, tok: Tokenizer, tmp_path: Path) -> None:
        settings = config(output=tmp_path, checkpoint_every=2)
        interrupted(adapted(lora_dropout=0.2), tok, settings, at_pass=5)
        self.run(tok, settings.model_copy(update={change: 3 if change.endswith("every") else True}), resume=True)

    def test_a_truncated_checkpoint(self, tok: Tokenizer, tmp_path: Path) -> None:
        settings = config(output=tmp_path, checkpoint_every=2)
        self.run(tok, settings)
        (file,) = (tmp_path / "checkpoints").glob("step-*/state.safetensors")
        assert load_file(file)
        file.write_bytes(file.read_bytes()[:-10])
        with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*step-000006"):
            self.run(tok, settings, resume=True)


def _adapted_with(**changes: Any) -> Decoder:
    """Return `adapted()` with another configuration."""
    model = small_decoder(**changes)
    torch.manual_seed(0)
    add_adapter(model, LoraConfig(r=4, lora_alpha=8))
    return model


class TestTheDay:
    """A chat template that asks for today's date: a run keeps its first day."""

    @pytest.fixture
    def dated(self, tmp_path: Path) -> Path:
        make_tokenizer(tmp_path, "Today is {{ strftime_now('%d %b') }}\n" + CHATML, SPECIAL, ["<|im_end|>"], byte_level)
        return tmp_path

    def test_a_run_that_goes_on_the_next_day(self, dated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first, second = date(2026, 11, 27), date(2026, 11, 28)
        whole = adapted()
        expected = train(whole, load_tokenizer(dated, first), CONVERSATIONS, config(), CONVERSATIONS[:2])
        settings = config(output=dated / "run", checkpoint_every=2)
        monkeypatch.setattr(tokenizer, "today", lambda: first)
        interrupted(adapted(), load_tokenizer(dated), settings, 6)
        monkeypatch.setattr(tokenizer, "today", lambda: second)
        model, tok = adapted(), load_tokenizer(dated)
        with pytest.warns(UserWarning, match="the date on which the run began, 2026-11-27"):
            result = train(model, tok, CONVERSATIONS, settings, CONVERSATIONS[:2], resume=True)
        assert same(values_of(model), values_of(whole)) and timeless(result.history) == timeless(expected.history)
        assert tok.date == second  # the caller's is as it was

    def test_another_day_that_was_chosen_is_another_run(self, dated: Path) -> None:
        settings = config(output=dated / "run", checkpoint_every=2)
        interrupted(adapted(), load_tokenizer(dated, date(2026, 11, 27)), settings, 6)
        with pytest.raises(TrainingError, match="other settings, data or adapter"):
            train(adapted(), load_tokenizer(dated, date(2026, 11, 28)), CONVERSATIONS, settings, resume=True)
