"""The measurements of training, on tiny models: our sides run, and what they are compared by is computed right."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from made import conversations, small_decoder, write_checkpoint

from bench.adapters import dora
from bench.harness.make_llama import SMOLLM2, make_llama
from bench.harness.processes import ROOT, Figures, Side
from bench.training import memory, sft, step_7b, train_step
from bench.training.sides import lorakit_sft, lorakit_step
from bench.training.sides.common import digest
from lorakit import load_records, load_tokenizer, save_records
from lorakit.data import batch_order, encode_records
from lorakit.files import write_text

VOCABULARY = 512
TINY = SMOLLM2 | {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_llama(folder, TINY)
    return folder


def test_a_side_runs_in_a_process_of_its_own(tiny: Path) -> None:
    figures = step_7b.side(tiny, length=16, steps=2).measure()
    assert len(figures["seconds"]) == 2 and len(figures["losses"]) == 3
    assert figures["losses"][0] == pytest.approx(math.log(VOCABULARY), rel=0.1)  # random weights know nothing
    assert figures["losses"][2] < figures["losses"][0]
    assert 0 < figures["imports_mb"] < figures["loaded_mb"] <= figures["loading_peak_mb"] <= figures["peak_mb"]
    assert figures["products"] > 0
    assert len(step_7b.row(figures)) == 7


def test_settings_and_unquantized_weights(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", str(tiny), "--length", "16", "--steps", "1", "--quant-type", "none"]
    lorakit_step.main([*given, "--set", "optimizer=adamw_8bit"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["losses"][1] < figures["losses"][0]
    assert "products" not in figures


def test_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_checkpoint(tmp_path / "model", small_decoder())
    records = conversations(12)
    save_records(tmp_path / "train.jsonl", records)
    side = sft.Files(tmp_path, str(model), lr=1e-2).ours(seed=1)
    lorakit_sft.main(side.arguments)
    figures = json.loads(capsys.readouterr().out)
    assert figures["samples"] == 12 and len(figures["losses"]) == 2
    examples = encode_records(load_tokenizer(model), records, 1024)
    assert figures["digest"] == digest((e.input_ids, e.loss_mask) for e in reversed(examples))
    for folder in ("start-1", "ours-1"):
        assert (tmp_path / folder / "adapter_model.safetensors").is_file()


def test_both_sides_get_the_records_in_one_order(tmp_path: Path) -> None:
    rows = [{"text": f"{i} Main Street", "fields": {"AddressNumber": str(i)}} for i in range(20)]
    write_text(tmp_path / "data.jsonl", "".join(json.dumps(row) + "\n" for row in [*rows, rows[3]]))
    records = sft.read_addresses(tmp_path / "data.jsonl")
    assert sorted(record.messages[0].content for record in records) == sorted(row["text"] for row in rows)
    assert all(json.loads(r.messages[1].content)["AddressNumber"] in r.messages[0].content for r in records)
    sft.write_files(sft.Files(tmp_path, "model", 1e-3), records[:18], records[18:], seeds=1)
    ours, theirs = (load_records(tmp_path / name) for name in ("train.jsonl", "train-0.jsonl"))
    in_batches = [ours[index].messages for batch in batch_order(18, sft.BATCH, 0, 0) for index in batch]
    assert [record.messages for record in theirs] == in_batches
    assert len(load_records(tmp_path / "held-out.jsonl")) == 2


def run_of(seconds: float, peak_mb: float, loss: float = 1.0) -> Figures:
    return {"seconds": [seconds], "peak_mb": peak_mb, "losses": [loss], "imports_mb": 1.0, "loaded_mb": 2.0}


def test_targets_of_a_step() -> None:
    cases = train_step.cases("folder", train_step.SIZES["smollm2-135m-instruct"], steps=1, dropout=0.0)
    qlora, lora, full = cases
    seen = {side: [run_of(4.0, 1010.0)] for case in cases for side in case.sides}
    seen[qlora.ours] = [run_of(1.0, 310.0), run_of(3.0, 510.0), run_of(1.5, 410.0)]  # medians: 1.5 s, 410 MiB
    seen[lora.ours] = [run_of(2.0, 610.0)]
    seen[qlora.ours_lean] = [run_of(2.0, 260.0)]
    seen[qlora.peers[1]] = [run_of(3.0, 2010.0)]  # the fastest is not the leanest
    seen[full.peers[1]] = [run_of(2.7, 3010.0)]
    found = train_step.targets(cases, seen, train_step.Size(1, 1, True, (), qlora_of_lora=1.1), interpreter=10.0)
    values = {target.name: target.value for target in found}
    assert values == {
        "QLoRA: PEFT's step / ours": pytest.approx(2.0),
        "QLoRA: peak memory of PEFT's": pytest.approx(0.4),
        "QLoRA: peak memory, checkpointing of PEFT's": pytest.approx(0.25),
        "QLoRA: transformers' full fine-tuning step / ours": pytest.approx(1.8),
        "LoRA bf16: PEFT's step / ours": pytest.approx(2.0),
        "LoRA bf16: peak memory of PEFT's": pytest.approx(0.6),
        "LoRA bf16: peak memory, checkpointing of PEFT's": pytest.approx(1.0),
        "LoRA bf16: transformers' full fine-tuning step / ours": pytest.approx(1.35),
        "our QLoRA step / our LoRA step": pytest.approx(0.75),
    }
    assert [target.met for target in found] == [True, True, True, True, True, False, False, False, True]
    train_step.check_losses(cases, seen)
    with pytest.raises(AssertionError, match="first losses differ"):
        train_step.check_losses(cases, seen | {qlora.ours: [run_of(1.0, 1.0, loss=1.05)]})
    assert len(train_step.rows(seen, 1024, 10.0)) == len(seen)


def test_targets_of_fine_tuning() -> None:
    files = sft.Files(Path("folder"), "model", 1e-3)
    ours, fast = ([make(seed) for seed in range(2)] for make in (files.ours, lambda seed: files.peer(seed, "defaults")))
    lean = files.peer(0, "no autocast")
    seen: dict[Side, Figures] = {}
    runs = [(ours[0], 2, 210), (fast[0], 8, 1010), (ours[1], 2, 410), (fast[1], 8, 910), (lean, 9, 610)]
    for side, seconds, peak in runs:
        seen[side] = run_of(seconds, peak) | {"samples": 16, "digest": "same"}
    losses = {ours[0]: 1.0, ours[1]: 1.1, fast[0]: 1.2, fast[1]: 0.8}
    values = [target.value for target in sft.targets(seen, losses, interpreter=10.0)]
    assert values == pytest.approx([4.0, 200 / 600, 1.05])
    sft.check_alike(seen)
    with pytest.raises(AssertionError, match="tokens"):
        sft.check_alike(seen | {lean: seen[lean] | {"digest": "other"}})


def test_straight_lines_and_flat_ones() -> None:
    lengths = [512, 1024, 2048, 4096, 8192]
    assert memory.residual({n: 100 + 0.2 * n for n in lengths}) == pytest.approx(0, abs=1e-12)
    assert memory.residual({n: 1e-5 * n * n for n in lengths}) > 2 * memory.MAX_RESIDUAL
    assert memory.growth({1: 4.0, 2: 9.0, 8: 5.0}) == 1.25


def test_memory_of_each_configuration() -> None:
    named = memory.sides(Path("folder"))
    assert len(named) == len(memory.CONFIGURATIONS) * (len(memory.OURS) + len(memory.PEERS))
    parts = memory.parts({"imports_mb": 1024.0, "loaded_mb": 1536.0, "peak_mb": 4096.0})
    assert parts == {"imports": 1.0, "model": 0.5, "training": 2.5}


def test_a_step_is_planned_as_it_is_measured(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(memory.SHAPES, "tiny", TINY)
    step = memory.Step(2, 16, None, ("checkpointing=2", "optimizer=adamw_8bit"), dora=True)
    assert str(step) == "bf16, 2 x 16, checkpointing=2, optimizer=adamw_8bit, DoRA"
    made = memory.predicted("tiny", step, runtime_bytes=0)
    assert made.parts["runtime"] == 0 < made.peak_bytes
    figures = step.ours("tiny", tiny, steps=2).measure()
    assert len(figures["losses"]) == 3 and memory.training_mb(figures) > 0


def test_the_planned_steps_are_those_of_the_stored_figures() -> None:
    stored = json.loads((ROOT / "docs" / "benchmarks" / "plan.json").read_text())
    assert [(row["shape"], row["configuration"]) for row in stored["rows"]] == [
        (shape, str(step)) for shape, step in memory.PLANNED
    ]


def test_what_memory_is_made_of_and_how_it_grows_is_drawn(tmp_path: Path) -> None:
    stacks = {("QLoRA", who): {"imports": 0.3, "model": 0.2, "training": 1.0} for who in ("lorakit", "PEFT")}
    points = {who: {512: 100.0, 1024: 200.0} for who in ("lorakit", "PEFT")}
    memory.draw_parts(stacks, tmp_path / "a.svg")
    memory.draw_growth({"tokens": points, "vocabulary": points}, tmp_path / "b.svg")
    assert "training" in (tmp_path / "a.svg").read_text() and "vocabulary" in (tmp_path / "b.svg").read_text()


def test_sizes_are_made_once(tmp_path: Path) -> None:
    for length in (16, 32):
        both = memory.pair(tmp_path, TINY, length)
        assert both["lorakit"].arguments[:2] == both["PEFT"].arguments[:2]
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == VOCABULARY


def test_every_trick_can_be_taken_out() -> None:
    take_all_out = "for take_out in WITHOUT.values(): take_out()"
    code = f"from bench.training.sides.without import WITHOUT\n{take_all_out}\nprint(len(WITHOUT))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "5", run.stderr


def test_dora_is_compared_with_our_lora(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = dora.cases(str(tiny), length=16, steps=1)
    seen: dict[Side, list[Figures]] = {}
    for sides in found.values():
        lora, ours, peer = sides.values()
        seen |= {lora: [run_of(2.0, 110.0)], ours: [run_of(2.2, 130.0)], peer: [run_of(6.6, 510.0)]}
    values = [target.value for target in dora.targets(found, seen, interpreter=10.0)]
    assert values == pytest.approx(2 * [1.1, 1.2, 3.0])
    dora.check_losses(found, seen)
    losses = []
    for who in dora.WHO[:2]:
        lorakit_step.main(found["NF4"][who].arguments)
        losses.append(json.loads(capsys.readouterr().out)["losses"])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=2e-3)  # a fresh DoRA adapter changes nothing
    assert losses[0][1] != losses[1][1]
