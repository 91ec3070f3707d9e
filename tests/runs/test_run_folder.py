"""One folder, one run: what is refused, what a refusal leaves, what replaces what, and what a kill leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from made import conversations

from lorakit import LoraConfig, TrainConfig, add_adapter, load_model, load_tokenizer, save_records, train
from lorakit.errors import ConfigError, LorakitError, StorageError, TrainingError
from lorakit.locks import locked
from lorakit.runs import load_recipe
from lorakit.runs.run import evaluate_run, train_run
from lorakit.runs.run_folder import how_to_go_on
from lorakit.training import TrainingProbe

QUICK = ("eval=null", "data.eval=null")
CHECKPOINTS = ("train.checkpoint_every=2", "train.max_steps=6")


def run(*overrides: str, **how: bool) -> list[str]:
    said: list[str] = []
    train_run(load_recipe("recipe.yaml", overrides), said.append, **how)
    return said


class Stop(TrainingProbe):
    """Interrupts a run as Ctrl-C would, before a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def before_step(self, step: int) -> None:
        if step == self.at:
            raise KeyboardInterrupt


def stopped(monkeypatch: pytest.MonkeyPatch, at: int, *overrides: str, **how: bool) -> None:
    """Carry out a run that is interrupted before step `at`."""
    with monkeypatch.context() as patch:
        patch.setattr("lorakit.runs.run.Probes", lambda config, say: Stop(at))
        with pytest.raises(KeyboardInterrupt):
            run(*overrides, "probes={}", **how)


def contents(folder: str = "run") -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def hidden() -> list[str]:
    return [path.name for path in Path().iterdir() if path.name.startswith(".")]


def steps(folder: str = "run") -> list[int]:
    return [json.loads(line)["step"] for line in Path(folder, "train.jsonl").read_text().splitlines()]


def learning_rate(folder: str = "run") -> float:
    return load_recipe(Path(folder) / "recipe.yaml").train.lr


class TestAFinishedRun:
    @pytest.mark.parametrize("change", ["train.lr=0.5", "data.max_length=5", "title=other", "model.quant_type=null"])
    def test_is_refused_and_stays(self, change: str, workshop: Path) -> None:
        run(*QUICK)
        before = contents()
        with pytest.raises(StorageError, match=r"run holds a run: it is finished \('small talk'\); .*--overwrite"):
            run(*QUICK, change)
        assert contents() == before and hidden() == []

    def test_is_replaced_by_another(self, workshop: Path) -> None:
        run(*QUICK, "train.checkpoint_every=2")
        run(*QUICK, "output=alone", "train.lr=0.5")
        run(*QUICK, "train.lr=0.5", overwrite=True)
        assert hidden() == [] and not Path("run/checkpoints").exists()
        assert contents("run/adapter").values().__len__() == 2
        for (_, ours), (_, alone) in zip(
            contents("run/adapter").items(), contents("alone/adapter").items(), strict=True
        ):
            assert ours == alone
        assert learning_rate() == 0.5

    @pytest.mark.parametrize("change", ["data.max_length=5", "lora.target_modules=[q_porj]", "model.device=cuda:77"])
    def test_stays_if_the_new_one_is_refused(self, change: str, workshop: Path) -> None:
        run(*QUICK)
        before = contents()
        with pytest.raises(LorakitError):
            run(*QUICK, change, overwrite=True)
        assert contents() == before and hidden() == []

    def test_stays_if_the_new_one_is_interrupted_which_then_can_be_resumed(
        self, workshop: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(*QUICK)
        before, changed = contents(), (*QUICK, *CHECKPOINTS, "train.lr=0.5")
        stopped(monkeypatch, 4, *changed, overwrite=True)
        assert contents() == before and hidden() == [".run.new"]
        assert "--resume" in how_to_go_on(Path("run"))
        with pytest.raises(TrainingError, match=r"lr: 0.5 in that run, 0.25 now"):
            run(*QUICK, *CHECKPOINTS, "train.lr=0.25", resume=True)
        assert contents() == before
        run(*changed, resume=True)
        run(*changed, "output=alone")
        assert contents("run/adapter").values().__len__() == 2 and hidden() == []
        assert [*contents("run/adapter").values()] == [*contents("alone/adapter").values()]
        assert learning_rate() == 0.5 and steps() == [1, 2, 3, 4, 5, 6]

    def test_what_else_is_in_the_folder_stays(self, workshop: Path) -> None:
        Path("run/data/deep").mkdir(parents=True)
        Path("run/data/deep/notes.txt").write_text("mine")
        Path("run/link").symlink_to("data")
        run(*QUICK)
        run(*QUICK, "train.lr=0.5", overwrite=True)
        assert Path("run/data/deep/notes.txt").read_text() == "mine" == Path("run/link/deep/notes.txt").read_text()
        assert learning_rate() == 0.5

    def test_behind_a_link_is_replaced_there(self, workshop: Path) -> None:
        Path("big").mkdir()
        Path("run").symlink_to("big/place")
        Path("big/place").mkdir()
        run(*QUICK)
        run(*QUICK, "train.lr=0.5", overwrite=True)
        assert Path("run").is_symlink() and learning_rate("big/place") == 0.5 and hidden() == []

    def test_evaluated_with_other_metrics_when_resumed(self, workshop: Path) -> None:
        run("train.checkpoint_every=2")
        adapter = contents("run/adapter")
        run("train.checkpoint_every=2", "eval.metrics=[chrf]", resume=True)
        assert contents("run/adapter") == adapter and hidden() == []
        assert "chrf" in json.loads(Path("run/metrics.json").read_text())["tuned"]
        assert "chrf" in Path("run/recipe.yaml").read_text()

    def test_without_checkpoints_has_nothing_to_resume(self, workshop: Path) -> None:
        run(*QUICK)
        before = contents()
        with pytest.raises(StorageError, match="no checkpoint to resume from, and it is finished"):
            run(*QUICK, resume=True)
        assert contents() == before

    def test_is_not_trained_over_from_python(self, workshop: Path) -> None:
        run(*QUICK)
        before = contents()
        model, tok = load_model("model"), load_tokenizer("model")
        add_adapter(model, LoraConfig(r=2))
        with pytest.raises(StorageError, match="run holds a finished run of `lorakit train`"):
            train(model, tok, conversations(4), TrainConfig(output=Path("run"), max_steps=1, progress=False))
        assert contents() == before


class TestAnUnfinishedRun:
    def test_is_refused_with_the_ways_on(self, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stopped(monkeypatch, 4, *QUICK, *CHECKPOINTS)
        before = contents()
        for change in ("train.lr=0.5", "train.lr=1e-2"):
            with pytest.raises(
                StorageError, match=r"it stopped after 3 steps .*; go on with it by --resume, replace it"
            ):
                run(*QUICK, *CHECKPOINTS, change)
        assert contents() == before

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ("train.lr=0.5", "lr: 0.01 in that run, 0.5 now"),
            ("lora.lora_alpha=9", "lora_alpha of adapter 'default': 8.0 in that run, 9.0 now"),
            ("train.optimizer=lion", "optimizer: adamw in that run, lion now"),
            ("model.quant_type=fp4", "the base model: not the same\n  model.quant_type: nf4 in that run, fp4 now"),
            ("model.quant_type=null", "the base model: not the same\n  model.quant_type: nf4 in that run, None now"),
            ("model.dtype=bfloat16", "the base model: not the same\n  model.dtype: float32 in that run, bfloat16 now"),
            ("data.train=eval.jsonl", "not the same\n  data.train: train.jsonl in that run, eval.jsonl now"),
        ],
    )
    def test_a_refused_resume_changes_nothing_and_says_what_differs(
        self, change: str, named: str, workshop: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stopped(monkeypatch, 4, *QUICK, *CHECKPOINTS)
        before = contents()
        with pytest.raises(TrainingError) as caught:
            run(*QUICK, *CHECKPOINTS, change, resume=True)
        assert named in str(caught.value)
        assert contents() == before and hidden() == []
        run(*QUICK, *CHECKPOINTS, resume=True)
        assert steps() == [1, 2, 3, 4, 5, 6]

    def test_a_base_whose_weights_were_replaced_is_another(
        self, workshop: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stopped(monkeypatch, 4, *QUICK, *CHECKPOINTS)
        config = json.loads(Path("model/config.json").read_text())
        Path("model/config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
        with pytest.raises(TrainingError, match="the base model: not the same"):
            run(*QUICK, *CHECKPOINTS, resume=True)

    @pytest.mark.parametrize("change", ["title=other", "train.eval_every=3", "train.progress=true"])
    def test_what_does_not_change_the_numbers_may_change(
        self, change: str, workshop: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stopped(monkeypatch, 4, *QUICK, *CHECKPOINTS)
        run(*QUICK, *CHECKPOINTS, change, resume=True)
        assert steps() == [1, 2, 3, 4, 5, 6]

    def test_may_have_moved_with_its_base_and_data(self, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stopped(monkeypatch, 4, *QUICK, *CHECKPOINTS)
        for name in ("model", "run", "train.jsonl"):
            Path(name).rename(f"new-{name}")
        moved = ("model.path=new-model", "output=new-run", "data.train=new-train.jsonl")
        run(*QUICK, *CHECKPOINTS, *moved, resume=True)
        assert steps("new-run") == [1, 2, 3, 4, 5, 6] and Path("new-run/adapter").is_dir()

    def test_without_a_checkpoint_begins_anew_and_keeps_its_log(
        self, workshop: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stopped(monkeypatch, 4, *QUICK)
        log = Path("run/train.jsonl").read_bytes()
        with pytest.raises(TrainingError, match=r"its recipe is another:\n  train.lr: 0.01 in that run, 0.5 now"):
            run(*QUICK, "train.lr=0.5", resume=True)
        assert Path("run/train.jsonl").read_bytes() == log and learning_rate() == 0.01
        said = run(*QUICK, resume=True)
        assert any("nothing to resume" in line for line in said)
        assert Path("run/train.jsonl.1").read_bytes() == log and steps() == [1, 2, 3, 4]

    def test_is_replaced_by_another(self, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stopped(monkeypatch, 4, *QUICK, *CHECKPOINTS)
        before = contents()
        stopped(monkeypatch, 2, *QUICK, *CHECKPOINTS, "train.lr=0.5", overwrite=True)
        assert contents() == before
        run(*QUICK, "train.lr=0.5", overwrite=True)
        assert steps() == [1, 2, 3, 4] and not Path("run/checkpoints").exists() and hidden() == []

    def test_that_took_no_step_is_in_nobodys_way(self, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stopped(monkeypatch, 1, *QUICK)
        assert Path("run/recipe.yaml").is_file()
        run(*QUICK, "train.lr=0.5")
        assert learning_rate() == 0.5


class TestTheFolder:
    def test_nothing_to_resume_is_said(self, workshop: Path) -> None:
        assert any("nothing to resume: run has neither" in line for line in run(*QUICK, resume=True))

    def test_resume_and_overwrite_exclude_each_other(self, workshop: Path) -> None:
        with pytest.raises(ConfigError, match="either resumed or overwritten"):
            run(*QUICK, resume=True, overwrite=True)

    @pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
    def test_two_at_once(self, how: dict[str, bool], workshop: Path) -> None:
        Path("run").mkdir()
        with locked(Path("run")), pytest.raises(StorageError, match="being written by another process"):
            run(*QUICK, **how)
        assert list(Path("run").iterdir()) == []

    def test_evaluating_while_another_writes(self, workshop: Path) -> None:
        run()
        with locked(Path("run")), pytest.raises(StorageError, match="being written by another process"):
            evaluate_run(Path("run"), lambda line: None)

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("adapter/notes.txt", "adapter is not an adapter"),
            ("metrics.json/x", "metrics.json is a folder"),
            ("adapter", "adapter is a file"),
            ("checkpoints", "checkpoints is a file"),
        ],
    )
    def test_what_is_not_a_runs_is_never_replaced(
        self, name: str, message: str, overwrite: bool, workshop: Path
    ) -> None:
        path = Path("run") / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        with pytest.raises(StorageError, match=message):
            run(*QUICK, overwrite=overwrite)
        assert path.read_text() == "mine"

    def test_an_adapter_saved_by_hand_is_not_overwritten(self, workshop: Path) -> None:
        run(*QUICK)
        Path("other").mkdir()
        shutil.copytree("run/adapter", "other/adapter")
        for how in ({}, {"resume": True}):
            with pytest.raises(StorageError, match=r"other .*part of one|other has no checkpoint"):
                run(*QUICK, "output=other", **how)
        assert [path.name for path in Path("other").iterdir()] == ["adapter"]

    def test_ones_own_recipe_in_the_output_folder_keeps_its_bytes(self, workshop: Path) -> None:
        Path("train.jsonl").rename("questions.jsonl")
        text = Path("recipe.yaml").read_text().replace("train.jsonl", "questions.jsonl") + "# a comment\n"
        Path("recipe.yaml").write_text(text)
        with pytest.raises(StorageError, match="holds a run"):
            run(*QUICK, "output=.")
        Path("recipe.yaml").write_text(text.replace("output: run", "output: ."))
        run()
        assert Path("recipe.yaml").read_text().endswith("# a comment\n") and Path("adapter").is_dir()

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_data_are_not_written_over(self, overwrite: bool, workshop: Path) -> None:
        data = Path("train.jsonl").read_bytes()
        with pytest.raises(StorageError, match=r"data.train is train.jsonl, where the run writes a file of its own"):
            run(*QUICK, "output=.", overwrite=overwrite)
        assert Path("train.jsonl").read_bytes() == data

    def test_no_room_on_the_disk(self, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        full = shutil.disk_usage(".")._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
        with pytest.raises(StorageError, match=r"run: [\d,]+ bytes are needed, 1,000 are free"):
            run(*QUICK)
        assert not Path("run").exists()

    def test_removed_while_training(self, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Remove(TrainingProbe):
            def before_step(self, step: int) -> None:
                if step == 3:
                    Path("run").rename("away")

        monkeypatch.setattr("lorakit.runs.run.Probes", lambda config, say: Remove())
        with pytest.raises(StorageError, match=r"run was removed or renamed .* the adapter is in run/adapter"):
            run(*QUICK, "probes={}")
        assert Path("run/adapter/adapter_config.json").is_file() and steps("away") == [1, 2, 3, 4]

    def test_the_ways_on_after_an_interruption(self, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert how_to_go_on(Path("run")) == "nothing was written"
        stopped(monkeypatch, 3, *QUICK)
        assert "no checkpoint" in how_to_go_on(Path("run")) and "--overwrite" in how_to_go_on(Path("run"))
        stopped(monkeypatch, 4, *QUICK, *CHECKPOINTS, overwrite=True)
        assert "--resume" in how_to_go_on(Path("run"))


def test_leaves_no_trace_of_an_earlier_run_in_its_log(workshop: Path) -> None:
    run(*QUICK, "train.max_steps=6")
    run(*QUICK, "train.max_steps=3", overwrite=True)
    assert steps() == [1, 2, 3] and json.loads(Path("run/metrics.json").read_text())["counts"]["steps"] == 3


def test_data_equal_to_the_training_data_are_told_in_one_line(workshop: Path) -> None:
    def notes(*overrides: str) -> list[str]:
        return [line for line in run(*overrides, "eval=null", overwrite=True) if "warning" in line]

    (line,) = notes("data.eval=train.jsonl")
    assert "the held-out records are the training records" in line
    save_records("eval.jsonl", [*reversed(conversations(8))])
    assert notes() == [line]
    save_records("eval.jsonl", conversations(3))
    (line,) = notes()
    assert "every held-out question is trained on" in line
    save_records("eval.jsonl", [*conversations(2), *conversations(1, start=30)])
    first, second = notes()
    assert "eval.jsonl:1" in first and "eval.jsonl:2" in second
