"""Results print as a few sentences or a short table; `repr` is one line."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from made import adapted, conversations, small_config, small_decoder, small_tokenizer, write_checkpoint

from lorakit import (
    LoraConfig,
    TrainConfig,
    adapter_parameters,
    adapter_status,
    add_adapter,
    inspect_adapter,
    load_model,
    merge_adapter,
    plan,
    save_adapter,
    train,
)
from lorakit.evaluation import verdict
from lorakit.inspection.probes import ProbeConfig, Probes, read_probes
from lorakit.inspection.quantization import quantization_view
from lorakit.models.quantize_checkpoint import quantize_checkpoint
from lorakit.printed import WIDTH


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One of each result, of a model with 28 adapted layers."""
    folder = tmp_path_factory.mktemp("printed")
    base = write_checkpoint(folder / "base", small_decoder(num_hidden_layers=4), small_config(num_hidden_layers=4))
    tok, model = small_tokenizer(folder), load_model(base)
    found: dict[str, Any] = {"match": add_adapter(model, LoraConfig(r=4))}
    for parameter in adapter_parameters(model):
        parameter.data += 0.05 * torch.randn_like(parameter)
    settings = TrainConfig(max_steps=300, batch_size=1, progress=False, eval_every=50, output=folder / "run")
    probes = [Probes(ProbeConfig(), lambda text: None)]
    found["train"] = train(model, tok, conversations(4), settings, conversations(2, 9), probes=probes)
    found["probes"] = read_probes(folder / "run")
    save_adapter(model, folder / "adapter")
    found["info"] = inspect_adapter(folder / "adapter", base=base, vs=folder / "adapter")
    found |= {"layer": found["info"].layers[0], "comparison": found["info"].comparison}
    found["similarity"] = found["comparison"].layers[0]
    found |= {"plan": plan(base), "status": adapter_status(model), "quantization": quantization_view(model)}
    found["quantized"] = quantize_checkpoint(base, folder / "nf4")
    found["verdict"] = verdict(None, {}, 17.0, 18.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found["merge"] = merge_adapter(model)
    return found


NAMES = (
    "match", "train", "probes", "info", "layer", "comparison", "similarity", "plan", "status", "quantization",
    "quantized", "verdict", "merge",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_short(name: str, results: dict[str, Any]) -> None:
    lines = str(results[name]).split("\n")
    assert 1 <= len(lines) <= 45 and all(len(line) <= 2 * WIDTH for line in lines)
    assert "Info(" not in lines[0] and not any("=(" in line or "Path(" in line for line in lines)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("match", "status", "merge")])
def test_repr_is_a_line(name: str, results: dict[str, Any]) -> None:
    text = repr([results[name]])
    assert "\n" not in text and len(text) < 3 * WIDTH and type(results[name]).__name__ in text


def test_training_shows_its_last_step_and_about_ten_rows(results: dict[str, Any]) -> None:
    result = results["train"]
    head, columns, *rows = str(result).split("\n")
    assert head.startswith("300 steps in ") and f"held-out loss {result.eval_loss:.4f}" in head
    assert columns.split() == ["step", "loss", "eval_loss", "lr", "grad_norm", "tokens"]
    assert len(rows) == 10 and rows[-1].split()[:2] == ["300", f"{result.history[-1]['loss']:.4f}"]
    assert len({len(row) for row in [columns, *rows]}) == 1


def test_training_without_held_out_records_or_steps(tmp_path: Path) -> None:
    settings = TrainConfig(max_steps=2, batch_size=2, progress=False)
    result = train(adapted(), small_tokenizer(tmp_path), conversations(2), settings)
    assert "held-out" not in str(result) and "eval_loss" not in str(result) and str(result).count("\n") == 3
    assert str(type(result)()).startswith("0 steps in 0.0 s")


def test_an_adapter_shows_findings_and_figures(results: dict[str, Any]) -> None:
    info, text = results["info"], str(results["info"])
    assert info.summary in text and "q_proj" in text and "rank for" in text
    assert all(finding[:40] in text for finding in info.findings)


def test_a_plan_shows_its_parts(results: dict[str, Any]) -> None:
    assert all(part in str(results["plan"]) for part in results["plan"].parts)
