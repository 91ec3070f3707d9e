"""The peers' scripts of bench/, on tiny models: they run, and compute what ours compute."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from made import conversations, small_config, small_decoder, write_checkpoint

from bench.harness.make_llama import SMOLLM2, make_llama
from bench.training.sft import SETTINGS, Files, write_files
from bench.training.sides import lorakit_sft, lorakit_step

peft_step = importlib.import_module("bench.training.sides.peft_step")
trl_sft = importlib.import_module("bench.training.sides.trl_sft")
held_out = importlib.import_module("bench.training.sides.held_out")

TINY = SMOLLM2 | {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LORA = 16 * 2 * (3 * (64 + 128) + 2 * (64 + 32) + 2 * (64 + 64))  # parameters: rank, layers, sum of in + out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_llama(folder, TINY)
    return folder


@pytest.fixture
def figures(capsys: pytest.CaptureFixture[str]) -> Any:
    """figures(script, arguments): what a script prints, run in this process."""

    def run(script: Any, arguments: Any) -> dict[str, Any]:
        script.main([str(argument) for argument in arguments])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ([], LORA),
        (["--adapter-dtype", "float32", "--attention", "eager"], LORA),
        (["--quant-type", "none", "--gradient-checkpointing"], LORA),
        (["--quant-type", "none", "--full"], None),
    ],
)
def test_a_step(tiny: Path, figures: Any, settings: list[str], trained: int | None) -> None:
    common = ["--model", tiny, "--length", "32", "--steps", "1"]
    theirs = figures(peft_step, [*common, *settings])
    ours = figures(lorakit_step, [*common, *(settings[:2] if "none" in settings else [])])
    assert theirs["losses"][0] == pytest.approx(ours["losses"][0], rel=2e-3)  # bf16
    assert theirs["losses"][1] < theirs["losses"][0]
    assert trained in (None, theirs["trained"])
    assert theirs["peak_mb"] >= theirs["imports_mb"]


@pytest.mark.parametrize("setting", ["defaults", "no checkpointing, no autocast, eager"])
def test_fine_tuning(setting: str, tmp_path: Path, figures: Any) -> None:
    model = write_checkpoint(tmp_path / "model", small_decoder(), small_config(model_type="llama"))
    files = Files(tmp_path, str(model), lr=1e-2)
    write_files(files, conversations(24), conversations(5, start=30), seeds=1)
    sides = files.ours(0), files.peer(0, setting)
    assert setting in SETTINGS
    ours, theirs = (figures(script, side.arguments) for script, side in zip((lorakit_sft, trl_sft), sides, strict=True))
    assert ours["digest"] == theirs["digest"]
    assert ours["samples"] == theirs["samples"] == 24
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=0.02)  # the same batches, rounded to bf16
    assert ours["losses"][-1] < ours["losses"][0]
    adapters = [part for side in sides for part in ("--adapter", files.adapter(side))]
    losses = figures(held_out, ["--model", model, "--records", tmp_path / "held-out.jsonl", *adapters])
    assert losses[files.adapter(sides[0])] == pytest.approx(losses[files.adapter(sides[1])], rel=0.02)
