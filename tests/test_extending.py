"""A new entry of each kind is one definition and one line in its table: here it is defined, registered and used.

Each test defines its entry in this file, puts it into the table until the test ends, and takes it through everything
that its kind takes part in: training, saving, loading, merging, inspecting, planning, the command line. Nothing else of
lorakit may need to know of it.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import conversations, small_decoder, write_checkpoint, write_run_folder
from torch import Tensor
from typer.testing import CliRunner

import lorakit as lk
from lorakit.adapters.exports import EXPORTS
from lorakit.adapters.exports.export import Export
from lorakit.adapters.starts import STARTS, Start
from lorakit.adapters.starts.matrices import base_matrix, set_factors
from lorakit.cli.app import app
from lorakit.evaluation.metrics import METRICS, Metric, MetricConfig
from lorakit.layers import AdaptedLayer
from lorakit.runs import load_recipe
from lorakit.runs.run import train_run

Register = Callable[[MutableMapping[Any, Any], Any, Any], None]

IDS = torch.arange(24).view(2, 12) + 100


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """register(table, name, entry): as the line in the table would, until the test ends."""
    return monkeypatch.setitem


@dataclass
class Trained:
    """What an adapter's life on a small model came to.

    Attributes:
        config: of the adapter.
        report: of `add_adapter`.
        folder: of the saved adapter.
        model: with the adapter on it, after two steps.
        plan: for these settings.
    """

    config: lk.LoraConfig
    report: Any
    folder: Path
    model: lk.Decoder
    plan: lk.Plan


def lived_through(folder: Path, lora: lk.LoraConfig, **load: Any) -> Trained:
    """Attach an adapter to a small model, train it for two steps, save it, load it, merge it, inspect it, plan it.

    Logits of a loaded or merged adapter must be those of the trained one, within a hundredth of what training changed.
    """
    base = write_checkpoint(folder / "model", small_decoder())
    loading = {"quant_type": None, "dtype": torch.float32, **load}
    model, tok = lk.load_model(base, **loading), lk.load_tokenizer(base)
    torch.manual_seed(0)
    before = logits(model)
    report = lk.add_adapter(model, lora)
    settings = lk.TrainConfig(lr=1e-2, max_steps=2, batch_size=2, progress=False)
    result = lk.train(model, tok, conversations(4), settings)
    assert result.steps == 2
    trained = logits(model)
    bound = float((trained - before).abs().max()) / 100
    assert bound > 1e-4

    saved = lk.save_adapter(model, folder / "adapter")
    other = lk.load_model(base, **loading)
    lk.load_adapter(other, saved)
    torch.testing.assert_close(logits(other), trained, rtol=0, atol=bound)

    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lk.merge_adapter(model, base=False, quantize=False)
    torch.testing.assert_close(logits(model), trained, rtol=0, atol=bound)
    lk.unmerge_adapter(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())

    measured, live = lk.inspect_adapter(saved), lk.inspect_adapter(model)
    assert [layer.name for layer in measured.layers] == [layer.name for layer in live.layers] and measured.norm > 0
    assert live.norm == pytest.approx(measured.norm, rel=1e-5)

    plan = lk.plan(base, lora, settings, sequence_length=32, **{**loading, "device": "cpu"})
    assert (plan.trainable, plan.parameters + plan.adapter_parameters) == (report.trainable, report.total)
    return Trained(lora, report, saved, model, plan)


@torch.no_grad()
def logits(model: lk.Decoder) -> Tensor:
    was_training = model.training
    result = model.eval()(IDS)
    model.train(was_training)
    return result


# ---- a start ---------------------------------------------------------------------------------------------------------


class FirstRows(Start):
    """s B A is the first r rows of the base weight: A = W[:r] / s, and the columns of B are the unit vectors."""

    name = "first_rows"
    in_base = True
    peft_changes_base = True
    decomposes_weight = True

    def set_layer(self, layer: AdaptedLayer, name: str) -> None:
        rank = len(layer.lora_A[name])
        weight = base_matrix(layer, rank)
        set_factors(layer, name, weight[:rank] / layer.scaling[name], torch.eye(len(weight), rank))


@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_a_start(quant_type: str | None, register: Register, tmp_path: Path) -> None:
    register(STARTS, "first_rows", FirstRows())
    lora = lk.LoraConfig(r=4, lora_alpha=8, init_lora_weights="first_rows")
    trained = lived_through(tmp_path, lora, quant_type=quant_type)
    # It starts inside the base weight: twice the rank in the file, and as much again in memory that is not trained.
    assert lk.inspect_adapter(trained.folder).layers[0].rank == 8
    assert trained.plan.adapter_parameters == 2 * trained.plan.trainable
    assert "'first_rows' decomposes each weight" in trained.plan.notes[0]
    with pytest.raises(lk.LorakitError, match=r"starts inside the base weight \(.*first_rows\) exclude each other"):
        lk.LoraConfig(init_lora_weights="first_rows", use_dora=True)


def test_nothing_of_it_stays() -> None:
    with pytest.raises(lk.LorakitError, match="'first_rows' is not a start"):
        lk.LoraConfig(init_lora_weights="first_rows")


# ---- a metric --------------------------------------------------------------------------------------------------------


def shared_characters(metric: MetricConfig, outputs: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """The share of the reference's characters that the output has too."""
    pairs = zip(outputs, references, strict=True)
    return np.array([len(set(output) & set(reference)) / len(set(reference)) for output, reference in pairs])


def test_a_metric(register: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a recipe to the report, with the references checked before training."""
    register(METRICS, "shared", Metric(MetricConfig, shared_characters, "shared_characters", 1.0, "text"))
    write_run_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("recipe.yaml", ["eval.metrics=[shared]", "train.max_steps=2"])
    metrics = train_run(recipe, lambda line: None)
    for side in ("base_prompted", "tuned"):
        low, high = metrics[side]["intervals"]["shared_characters"]
        assert 0 <= low <= metrics[side]["shared_characters"] <= high <= 1
    assert r"| shared\_characters |" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


# ---- an export -------------------------------------------------------------------------------------------------------


def export_scalings(export: Export, path: Path) -> None:
    """For a consumer that wants nothing but each layer's rank and scaling."""
    lines = [f"{name} {layer.rank} {layer.scaling:g}" for name, layer in export.layers.items()]
    path.write_text("\n".join(lines), encoding="utf-8")


def test_an_export(register: Register, tmp_path: Path) -> None:
    register(EXPORTS, "scalings", export_scalings)
    model = small_decoder()
    lk.add_adapter(model, lk.LoraConfig(r=4, lora_alpha=6, target_modules=["layers.0.self_attn.q_proj"]))
    expected = "model.layers.0.self_attn.q_proj 4 1.5"
    written = lk.save_adapter(model, tmp_path / "scalings.txt", target="scalings")
    assert written.read_text(encoding="utf-8") == expected
    folder, out = lk.save_adapter(model, tmp_path / "adapter"), tmp_path / "again.txt"
    called = CliRunner().invoke(app, ["export", str(folder), "--target", "scalings", "--out", str(out)])
    assert called.exit_code == 0, called.output
    assert out.read_text(encoding="utf-8") == expected
    with pytest.raises(lk.LorakitError, match=r"did you mean 'scalings'\? \(known: .*scalings\)"):
        lk.save_adapter(model, tmp_path / "other", target="scaling")
