"""A new entry of each kind is one definition and one line in its table.

The definitions are the files of tests/extending, one for each kind. A test here adds one of them to its table by one
line, and takes it through everything that its kind takes part in: training, saving, loading, merging, inspecting,
planning, the command line. Nothing else in lorakit may need to know the entry.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lorakit_kernels as kernels
import pytest
import torch
from made import conversations, small_decoder, write_checkpoint, write_run_folder
from safetensors.torch import load_file
from tolerances import SMALL_DECODER, assert_alike, assert_within, rounding
from torch import Tensor, nn
from toy_codebook import even
from toy_data_set import build_sums
from toy_export import export_scalings
from toy_family import CONFIG, TOY
from toy_metric import SHARED
from toy_operation import leaky
from toy_optimizer import SignDescent
from toy_record_format import QUIZ
from toy_start import FirstRows
from toy_stored_format import ROWS, write_stored
from toy_variant import Weighted
from typer.testing import CliRunner

import lorakit as lk
from lorakit.adapters import MatchReport, lora_layers
from lorakit.adapters.exports import EXPORTS
from lorakit.adapters.starts import STARTS
from lorakit.checkpoints.formats import STORED_FORMATS
from lorakit.cli.app import app
from lorakit.data.data_sets import DATA_SETS
from lorakit.data.formats import RECORD_FORMATS
from lorakit.evaluation.metrics import METRICS
from lorakit.inspection.quantization import quantization_view
from lorakit.layers import VARIANTS
from lorakit.models import FAMILIES, DecoderConfig
from lorakit.models.load import meta_decoder
from lorakit.models.quantize_checkpoint import quantize_checkpoint
from lorakit.quantization import QUANT_TYPES
from lorakit.quantization.policy import QuantConfig
from lorakit.runs import load_recipe
from lorakit.runs.run import train_run
from lorakit.training.optimizers import OPTIMIZERS

Register = Callable[[MutableMapping[Any, Any], Any, Any], None]

IDS = torch.arange(24).view(2, 12) + 100
PLAIN = lk.LoraConfig(r=4, lora_alpha=8)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """register(table, name, entry): adds an entry as a line in the table would, until the test ends."""
    return monkeypatch.setitem


@dataclass
class Life:
    """An adapter that was trained, saved, loaded, merged, unmerged, inspected and planned.

    Attributes:
        report: of `add_adapter`.
        losses: of the two training steps.
        logits: after training.
        adapter: the saved folder.
        run: the folder of the training run.
        model: with the trained adapter on it.
        plan: for these settings.
    """

    report: MatchReport
    losses: list[float]
    logits: Tensor
    adapter: Path
    run: Path
    model: lk.Decoder
    plan: lk.Plan


def live(base: Path, lora: lk.LoraConfig = PLAIN, *, optimizer: str = "adamw", **load: Any) -> Life:
    """Attach an adapter to the model of a folder and take it through its life, in folders beside the model.

    A loaded or merged adapter must give the logits of the trained one, within a hundredth of what training changed.
    """
    loading = {"quant_type": None, "dtype": torch.float32, **load}
    model, tok = lk.load_model(base, **loading), lk.load_tokenizer(base)
    torch.manual_seed(0)
    before = logits(model)
    report = lk.add_adapter(model, lora)
    run = base.with_name("run")
    settings = lk.TrainConfig(
        lr=1e-2, max_steps=2, batch_size=2, progress=False, optimizer=optimizer, output=run, checkpoint_every=2
    )
    result = lk.train(model, tok, conversations(4), settings)
    trained = logits(model)
    largest = float(trained.abs().max())
    assert (trained - before).abs().max() > 100 * float(rounding(SMALL_DECODER, largest))

    saved = lk.save_adapter(model, base.with_name("adapter"))
    other = lk.load_model(base, **loading)
    lk.load_adapter(other, saved)
    assert_alike(logits(other), trained, SMALL_DECODER)

    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lk.merge_adapter(model, base=False, quantize=False)
    assert_alike(logits(model), trained, SMALL_DECODER)
    merged = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    lk.unmerge_adapter(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())

    measured, attached = lk.inspect_adapter(saved), lk.inspect_adapter(model)
    assert [layer.name for layer in measured.layers] == [layer.name for layer in attached.layers] and measured.norm > 0
    # Of the same matrices; the attached one's start inside the base is taken off, which the file has as more ranks.
    assert_within(attached.norm, measured.norm, rounding(16 + 4, 4 * measured.norm))
    for layer in measured.layers:
        base_layer = lora_layers(model)[layer.name].base_layer
        if isinstance(base_layer, nn.Linear):  # the measured norm is that of what the merge changed
            weight = merged[layer.name].double()
            changed = (weight - base_layer.weight.double()).norm()
            assert_within(layer.norm, changed, rounding(16 + 4, weight.norm()))

    plan = lk.plan(base, lora, settings, sequence_length=32, **{**loading, "device": "cpu"})
    assert (plan.trainable, plan.parameters + plan.adapter_parameters) == (report.trainable, report.total)
    return Life(report, [row["loss"] for row in result.history], trained, saved, run, model, plan)


@torch.no_grad()
def logits(model: lk.Decoder) -> Tensor:
    was_training = model.training
    result = model.eval()(IDS)
    model.train(was_training)
    return result


def command(*arguments: object) -> str:
    """Run `lorakit` with these arguments; return what it printed."""
    called = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert called.exit_code == 0, called.output
    return called.output


def edited_config(adapter: Path, copy: Path, **changes: Any) -> Path:
    """Copy an adapter's folder and change settings of its adapter_config.json; return the copy."""
    shutil.copytree(adapter, copy)
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return copy


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", small_decoder())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Life:
    """The life of plain LoRA, from which that of an entry must differ."""
    return live(write_checkpoint(tmp_path_factory.mktemp("plain") / "model", small_decoder()))


@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_a_start(quant_type: str | None, register: Register, base: Path, plain: Life, tmp_path: Path) -> None:
    register(STARTS, "first_rows", FirstRows())
    life = live(base, PLAIN.model_copy(update={"init_lora_weights": "first_rows"}), quant_type=quant_type)
    assert life.losses[1] != plain.losses[1]
    # It starts inside the base weight: twice the rank in the file, and as much again in memory that is not trained.
    assert lk.inspect_adapter(life.adapter).layers[0].rank == 8
    assert life.plan.adapter_parameters == 2 * life.plan.trainable
    assert "'first_rows' decomposes each weight" in life.plan.notes[0]
    peft = edited_config(plain.adapter, tmp_path / "peft", init_lora_weights="first_rows")
    with pytest.raises(lk.LorakitError, match="init_lora_weights 'first_rows', which changed the base model"):
        lk.load_adapter(lk.load_model(base), peft)
    with pytest.raises(lk.LorakitError, match=r"a start inside the base weight \('first_rows'\) exclude each other"):
        lk.LoraConfig(init_lora_weights="first_rows", use_dora=True)


def test_a_variant(register: Register, base: Path, plain: Life, tmp_path: Path) -> None:
    register(VARIANTS, "weighted", Weighted())
    life = live(base, PLAIN.model_copy(update={"variant": "weighted"}))
    assert not torch.allclose(life.logits, plain.logits)
    # One more vector a layer, of out_features numbers: trained, saved, counted.
    layers = lora_layers(life.model)
    more = sum(layer.out_features for layer in layers.values())
    assert all(layer.row_weights["default"].any() for layer in layers.values())
    stored = load_file(life.adapter / "adapter_model.safetensors")
    assert sum(tensor.numel() for name, tensor in stored.items() if name.endswith(".row_weights")) == more
    assert life.plan.trainable == plain.plan.trainable + more
    assert life.plan.parts["adapters"] == plain.plan.parts["adapters"] + 4 * more
    # PEFT would read its file as plain LoRA, and so would a program that serves adapters.
    assert json.loads((life.adapter / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == "LORAKIT"
    with pytest.raises(lk.LorakitError, match="variant 'weighted': an update whose rows have weights"):
        lk.save_adapter(life.model, tmp_path / "export", target="vllm")
    with pytest.raises(lk.LorakitError, match="use_dora and variant 'weighted' exclude each other"):
        lk.LoraConfig(variant="weighted", use_dora=True)
    command("combine", tmp_path / "half", f"{life.adapter}=0.5")
    norm = lk.inspect_adapter(life.adapter).norm
    assert_within(lk.inspect_adapter(tmp_path / "half").norm, norm / 2, rounding(16 + 4, norm))


def test_a_codebook(register: Register, base: Path, tmp_path: Path) -> None:
    register(QUANT_TYPES, "even", even)
    life = live(base, quant_type="even", block_size=128)
    layer: Any = life.model.get_submodule("model.layers.0.mlp.up_proj.base_layer")
    assert torch.equal(layer.quantized.code_values, torch.linspace(-1, 1, 16) ** 3)
    weights = [tensor for name, tensor in life.model.state_dict().items() if "lora_" not in name]
    assert life.plan.parts["weights"] == sum(tensor.nbytes for tensor in weights)
    view = quantization_view(life.model)
    assert {row["quant_type"] for row in view.table()} == {"even"}
    assert life.losses != live(base, quant_type="nf4", block_size=128).losses

    assert "weights" in command("plan", base, "--quant-type", "even")
    command("quantize", base, tmp_path / "4bit", "--quant-type", "even", "--block-size", 128)
    assert torch.equal(
        logits(lk.load_model(tmp_path / "4bit", dtype=torch.float32)),
        logits(lk.load_model(base, quant_type="even", block_size=128, dtype=torch.float32)),
    )
    with pytest.warns(UserWarning, match="survived the merge"):
        lk.merge_adapter(life.model, base=base, quantize=True)
    merged: Any = life.model.get_submodule("model.layers.0.mlp.up_proj")
    assert merged.quant_type == "even"


def test_a_record_format(register: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(RECORD_FORMATS, "quiz", QUIZ)
    write_run_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    records = lk.load_records("train.jsonl")
    lines = [{"question": r.messages[0].content, "answer": r.messages[1].content} for r in records]
    Path("quiz.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert [r.messages for r in lk.load_records("quiz.jsonl")] == [r.messages for r in records]
    histories = []
    for file, name in (("train.jsonl", "messages"), ("quiz.jsonl", "quiz"), ("quiz.jsonl", "auto")):
        run = f"{name} of {file}"
        settings = [f"data.train={file}", f"data.format={name}", "data.eval=null", "eval=null", f"output={run}"]
        train_run(load_recipe("recipe.yaml", [*settings, "train.max_steps=2"]), lambda line: None)
        log = (tmp_path / run / "train.jsonl").read_text(encoding="utf-8").splitlines()
        histories.append([json.loads(line)["loss"] for line in log])
    assert len(histories[0]) == 2 and histories[0] == histories[1] == histories[2]
    assert "8 conversations" in command("data", "show", "quiz.jsonl", "--model", "model", "--format", "quiz")


def test_a_data_set(register: Register, base: Path, tmp_path: Path) -> None:
    register(DATA_SETS, "sums", build_sums)
    assert "8 sums to train on" in command("data", "build", "sums", "--out", tmp_path / "sums", "--seed", 3)
    records = lk.load_records(tmp_path / "sums" / "train.jsonl")
    model = lk.load_model(base)
    lk.add_adapter(model, PLAIN)
    settings = lk.TrainConfig(max_steps=2, batch_size=2, progress=False)
    assert lk.train(model, lk.load_tokenizer(base), records, settings).trained_tokens > 0


def test_an_optimizer(register: Register, base: Path, plain: Life) -> None:
    register(OPTIMIZERS, "sign", SignDescent)
    life = live(base, optimizer="sign")
    assert life.losses[0] == plain.losses[0] and not torch.allclose(life.logits, plain.logits)
    (file,) = (life.run / "checkpoints").glob("*/state.safetensors")
    signs = {name: tensor for name, tensor in load_file(file).items() if name.startswith("signs/")}
    assert sum(tensor.nbytes for tensor in signs.values()) == life.plan.trainable == life.plan.parts["optimizer"]


def test_a_metric(register: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes from the recipe to the report, and the references are checked before training."""
    register(METRICS, "shared", SHARED)
    write_run_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("recipe.yaml", ["eval.metrics=[shared]", "train.max_steps=2"])
    metrics = train_run(recipe, lambda line: None)
    for side in ("base_prompted", "tuned"):
        low, high = metrics[side]["intervals"]["shared_characters"]
        assert 0 <= low <= metrics[side]["shared_characters"] <= high <= 5
    assert "shared_characters" in metrics["verdict"]["sentence"]
    assert r"| shared\_characters |" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_a_family(register: Register, tmp_path: Path) -> None:
    register(FAMILIES, TOY.architecture, TOY)
    torch.manual_seed(0)
    model = lk.Decoder(DecoderConfig.from_dict(CONFIG)).requires_grad_(False).eval()
    base = write_checkpoint(tmp_path / "model", model, CONFIG)
    life = live(base)
    assert "model.layers.1.mlp.fc1" in life.report.matched["all-linear"]
    assert "base_model.model.model.layers.1.mlp.fc2.lora_A.weight" in load_file(
        life.adapter / "adapter_model.safetensors"
    )
    measured = lk.inspect_adapter(life.adapter, base=base)
    assert all(layer.base is not None for layer in measured.layers)
    config = DecoderConfig.from_dict(CONFIG)
    assert life.plan.parameters == sum(parameter.numel() for parameter in meta_decoder(config).parameters())
    exported = lk.save_adapter(life.model, tmp_path / "adapter.gguf", target="llama.cpp")
    assert b"blk.1.attn_q.weight.lora_a" in exported.read_bytes()
    quantize_checkpoint(base, tmp_path / "4bit")
    assert torch.equal(logits(lk.load_model(tmp_path / "4bit")), logits(lk.load_model(base)))


def test_an_export(register: Register, tmp_path: Path) -> None:
    register(EXPORTS, "scalings", export_scalings)
    model = small_decoder()
    lk.add_adapter(model, lk.LoraConfig(r=4, lora_alpha=6, target_modules=["layers.0.self_attn.q_proj"]))
    expected = "model.layers.0.self_attn.q_proj 4 1.5"
    written = lk.save_adapter(model, tmp_path / "scalings.txt", target="scalings")
    assert written.read_text(encoding="utf-8") == expected
    folder, out = lk.save_adapter(model, tmp_path / "adapter"), tmp_path / "again.txt"
    command("export", folder, "--target", "scalings", "--out", out)
    assert out.read_text(encoding="utf-8") == expected
    with pytest.raises(lk.LorakitError, match=r"did you mean 'scalings'\? \(known: .*scalings\)"):
        lk.save_adapter(model, tmp_path / "other", target="scaling")


def test_a_stored_format(register: Register, base: Path, tmp_path: Path) -> None:
    register(STORED_FORMATS, ROWS.method, ROWS)
    config = QuantConfig(block_size=32, double_quant=False)
    source = lk.load_model(base, dtype=torch.float32, quant_config=config)
    folder = write_stored(tmp_path / "stored" / "model", base)
    assert torch.equal(logits(lk.load_model(folder, dtype=torch.float32)), logits(source))
    life = live(folder, quant_type="nf4")
    assert isinstance(life.model.get_submodule("model.layers.0.mlp.up_proj.base_layer"), lk.Linear4bit)
    measured = lk.inspect_adapter(life.adapter, base=folder)
    dense = lk.load_model(folder, quant_type=None, dtype=torch.float32)
    for layer in measured.layers:
        weight = dense.get_submodule(layer.name).get_parameter("weight")
        assert layer.base is not None
        norm = weight.double().norm()
        assert_within(layer.base.base_norm, norm, rounding(weight.numel(), norm, torch.float64))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_operation(backend: str) -> None:
    """Every backend computes it, by its definition where it has no kernel; it differentiates and compiles."""
    x = torch.linspace(-1, 1, 8, dtype=torch.float64, requires_grad=True)
    with kernels.use_backend(backend):
        assert torch.equal(leaky(x, 0.25), leaky.definition(x, 0.25))
        assert torch.autograd.gradcheck(lambda x: leaky(x, 0.25), x)
        torch.library.opcheck(torch.ops.lorakit.leaky.default, (x, 0.25))


def test_a_recipe_names_several(register: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(VARIANTS, "weighted", Weighted())
    register(QUANT_TYPES, "even", even)
    register(OPTIMIZERS, "sign", SignDescent)
    register(METRICS, "shared", SHARED)
    write_run_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = ["lora.variant=weighted", "model.quant_type=even", "train.optimizer=sign", "eval.metrics=[shared]"]
    train_run(load_recipe("recipe.yaml", [*settings, "train.max_steps=2"]), lambda line: None)
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "in EVEN" in report and "optimizer: sign" in report and "variant: weighted" in report
    assert "shared_characters" in command("eval", "run")


def test_the_command_line_lists_each_table() -> None:
    listed = {
        ("quantize",): QUANT_TYPES,
        ("plan",): QUANT_TYPES,
        ("merge",): QUANT_TYPES,
        ("inspect",): QUANT_TYPES,
        ("export",): EXPORTS,
        ("data", "build"): DATA_SETS,
        ("data", "show"): RECORD_FORMATS,
    }
    for names, table in listed.items():
        text = command(*names, "--help")
        assert all(name in text for name in table), text


def test_nothing_of_them_stays() -> None:
    with pytest.raises(lk.LorakitError, match="'first_rows' is not a start"):
        lk.LoraConfig(init_lora_weights="first_rows")
