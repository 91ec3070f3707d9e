"""What probes write: alarms, the file of a run through kills and resuming, its tables."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from made import write_run_folder
from probed import CLOSE, CONVERSATIONS, config, dropping

from lorakit import Tokenizer, train
from lorakit.errors import ConfigError, DataError
from lorakit.inspection.probes import (
    ProbeConfig,
    Probes,
    read_probes,
)
from lorakit.runs import load_recipe
from lorakit.runs.run import train_run
from lorakit.training import TrainingProbe


class TestAlarms:
    def test_a_dead_layer_is_named_once(self, tok: Tokenizer) -> None:
        model, said = dropping(), []
        dead = model.get_submodule("model.layers.1.self_attn.v_proj")
        dead.scaling["default"] = 0.0  # so that no gradient can reach it, and B stays zero
        probes = Probes(CLOSE, said.append)
        train(model, tok, CONVERSATIONS, config(), probes=[probes])
        layers = ["model.layers.1.self_attn.v_proj"]
        assert probes.log.alarms == [
            {"step": 4, "what": "B is still zero", "layers": layers},
            {"step": 4, "what": "no gradient reaches A or B", "layers": layers},
        ]
        assert said == [
            "step 4: B is still zero: model.layers.1.self_attn.v_proj",
            "step 4: no gradient reaches A or B: model.layers.1.self_attn.v_proj",
        ]

    def test_a_healthy_run_raises_none(self, tok: Tokenizer) -> None:
        probes = Probes(CLOSE)
        train(dropping(), tok, CONVERSATIONS, config(), probes=[probes])
        assert probes.log.alarms == []


class TestFile:
    def test_it_is_the_same_without_a_folder(self, tok: Tokenizer, tmp_path: Path) -> None:
        inside, written = Probes(CLOSE), Probes(CLOSE)
        train(dropping(), tok, CONVERSATIONS, config(), probes=[inside])
        train(dropping(), tok, CONVERSATIONS, config(output=tmp_path), probes=[written])
        read = read_probes(tmp_path)
        assert inside.log.header == read.header == read_probes(tmp_path / "probes.jsonl").header
        assert [as_json(row) for row in inside.log.rows] == [as_json(row) for row in read.rows]
        assert read == written.log

    def test_an_interruption_anywhere_leaves_no_trace(self, tok: Tokenizer, tmp_path: Path) -> None:
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        train(dropping(), tok, CONVERSATIONS, config(output=whole), probes=[Probes(CLOSE)])
        for at_step in (2, 3, 5):
            stop = Stop(at_step)
            with pytest.raises(KeyboardInterrupt):
                settings = config(output=cut, checkpoint_every=2)
                train(dropping(), tok, CONVERSATIONS, settings, probes=[Probes(CLOSE), stop])
            train(dropping(), tok, CONVERSATIONS, settings, resume=True, probes=[Probes(CLOSE)])
            assert (cut / "probes.jsonl").read_bytes() == (whole / "probes.jsonl").read_bytes()

    def test_after_kill_9(self, tok: Tokenizer, tmp_path: Path) -> None:
        script = (
            "import sys, pathlib\n"
            "from probed import CLOSE, CONVERSATIONS, dropping, config\n"
            "from made import small_tokenizer\n"
            "from lorakit import train\n"
            "from lorakit.inspection.probes import Probes\n"
            "tok = small_tokenizer(pathlib.Path(sys.argv[2]))\n"
            "settings = config(max_steps=30, output=pathlib.Path(sys.argv[1]), checkpoint_every=4)\n"
            "train(dropping(), tok, CONVERSATIONS, settings, probes=[Probes(CLOSE)])\n"
        )
        run, folder = tmp_path / "run", tmp_path / "tok"
        folder.mkdir()
        path = os.pathsep.join(filter(None, sys.path))  # with the tests' own modules
        command = [sys.executable, "-c", script, str(run), str(folder)]
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})
        file, deadline = run / "probes.jsonl", time.monotonic() + 60
        while (not file.is_file() or file.read_bytes().count(b"\n") < 8) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert 8 <= len(file.read_text().splitlines()) < 31
        settings = config(max_steps=30, output=run, checkpoint_every=4)
        train(dropping(), tok, CONVERSATIONS, settings, resume=True, probes=[Probes(CLOSE)])
        train(dropping(), tok, CONVERSATIONS, config(max_steps=30, output=tmp_path / "whole"), probes=[Probes(CLOSE)])
        assert file.read_bytes() == (tmp_path / "whole" / "probes.jsonl").read_bytes()
        assert [row["step"] for row in read_probes(run).rows] == [*range(1, 31)]

    def test_parquet(self, tok: Tokenizer, tmp_path: Path) -> None:
        import pyarrow.parquet

        probes = Probes(CLOSE.model_copy(update={"parquet": True}))
        train(dropping(), tok, CONVERSATIONS, config(output=tmp_path), probes=[probes])
        assert pyarrow.parquet.read_table(tmp_path / "probes.parquet").to_pylist() == probes.log.table()

    def test_tensorboard_reads_what_was_written(self, tok: Tokenizer, tmp_path: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = CLOSE.model_copy(update={"tensorboard": True})
        settings = config(output=tmp_path, checkpoint_every=2)
        with pytest.raises(KeyboardInterrupt):
            train(dropping(), tok, CONVERSATIONS, settings, probes=[Probes(board), Stop(4)])
        result = train(dropping(), tok, CONVERSATIONS, settings, resume=True, probes=[Probes(board)])
        written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        losses = written.Scalars("train/loss")
        assert [event.step for event in losses] == [*range(1, 7)]
        assert [event.value for event in losses] == [torch.tensor(row["loss"]).item() for row in result.history]
        norms = {row["step"]: row["norm_B"] for row in read_probes(tmp_path).rows}
        for event in written.Scalars("norm_B/max"):
            assert event.value == torch.tensor(max(norms[event.step])).item()  # an fp32 number
        assert [event.step for event in written.Scalars("effective_rank/median")] == [2, 4, 6]

    def test_a_package_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "path", [])
        monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
        with pytest.raises(ConfigError, match="tensorboard is not installed: pip install"):
            Probes(ProbeConfig(tensorboard=True))

    def test_a_recipe_with_probes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        write_run_folder(tmp_path)
        recipe = load_recipe("recipe.yaml", ["probes={spectra_every: 2}", "eval=null"])
        said: list[str] = []
        train_run(recipe, said.append)
        log = read_probes("run")
        assert [row["step"] for row in log.rows] == [1, 2, 3, 4]
        assert "effective_rank" in log.rows[1] and "effective_rank" not in log.rows[0]
        assert load_recipe("run/recipe.yaml").probes == ProbeConfig(spectra_every=2)
        with pytest.raises(ConfigError, match="did you mean 'spectra_every'"):
            load_recipe("recipe.yaml", ["probes={spectra_evry: 2}"])

    def test_what_is_not_a_log(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"probes\.jsonl cannot be read: .*; train with probes"):
            read_probes(tmp_path)
        for text, message in (("{}\n", "expected the header"), ("[1]\n", ":1: expected a JSON object"),
                              ('{"format": 1}\n', "does not have the fields")):  # fmt: skip
            (tmp_path / "probes.jsonl").write_text(text)
            with pytest.raises(DataError, match=message):
                read_probes(tmp_path)

    def test_probes_that_watched_no_run(self) -> None:
        with pytest.raises(ConfigError, match="not watched a run"):
            _ = Probes().log


class Stop(TrainingProbe):
    """Interrupts before a step, as Ctrl-C would."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def before_step(self, step: int) -> None:
        if step == self.at_step:
            raise KeyboardInterrupt


def as_json(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"examples": [list(example) for example in row["examples"]]}
