"""The tables of the page "From PEFT": each row's code is run on both sides and compared.

A row's two cells start from the same state: one small checkpoint, in the peer's library on the left and in ours on the
right. A row whose outcome is not simply the model it leaves behind has a check of its own below, under its first cell.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made import small_config, small_decoder, write_checkpoint
from migration_rows import Names, Row, rows_of, run
from safetensors.torch import load_file
from tolerances import SMALL_DECODER, assert_alike, assert_alike_in_mean, assert_within, rounding, unit
from torch import Tensor, nn

import lorakit
from lorakit import LoraConfig, adapter_parameters, add_adapter, load_adapter, load_model, save_adapter
from lorakit.adapters import adapter_configs, lora_layers
from lorakit.training.optimizers.build import build_optimizer

peft = importlib.import_module("peft")
transformers = importlib.import_module("transformers")

IDS = torch.tensor([[5, 17, 300, 2, 41, 8]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), small_decoder(), small_config(model_type="llama"))


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters with something to say, saved by PEFT."""
    folders = {}
    for seed, name in enumerate(("default", "other")):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4 + seed, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
        folders[name] = tmp_path_factory.mktemp(name)
        peft.get_peft_model(their_base(checkpoint), config).save_pretrained(folders[name])
    return folders


@pytest.fixture
def sides(checkpoint: Path, adapters: dict[str, Path], tmp_path: Path) -> tuple[Names, Names]:
    """The names that the code of both columns may use, the model being the base."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
    shared = {
        "torch": torch,
        "ids": IDS,
        "pair": IDS.view(2, 3),
        "path": str(checkpoint),
        "adapter": str(adapters["default"]),
    }
    theirs = shared | {"peft": peft, "config": peft.LoraConfig(**config), "out": tmp_path / "theirs"}
    ours = shared | {"lorakit": lorakit, "lk": lorakit, "config": LoraConfig(**config), "out": tmp_path / "ours"}
    return (
        theirs | {"model": their_base(checkpoint)},
        ours | {"model": load_model(checkpoint, quant_type=None, dtype=torch.float32)},
    )


def their_base(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out = model.eval()(IDS)
    return out if isinstance(out, Tensor) else out.logits


def meaning(model: nn.Module) -> dict[str, dict[str, tuple[int, float, float, torch.dtype, bool]]]:
    """Module path -> adapter -> rank, scaling, dropout, dtype, and whether it is active."""
    found = {}
    if isinstance(model, peft.PeftModel):
        for path, layer in model.base_model.model.named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                found[path] = {
                    name: (
                        layer.r[name], layer.scaling[name], getattr(layer.lora_dropout[name], "p", 0.0),
                        layer.lora_A[name].weight.dtype, name in layer.active_adapters,
                    )
                    for name in layer.lora_A
                }  # fmt: skip
        return found
    for path, layer in lora_layers(model).items():
        found[path] = {
            name: (len(a), layer.scaling[name], layer.adapters[name].dropout_p, a.dtype, name in layer.active)
            for name, a in layer.lora_A.items()
        }
    return found


def assert_same_model(theirs: nn.Module, ours: nn.Module) -> None:
    assert meaning(theirs) == meaning(ours)
    their_logits, our_logits = logits(theirs), logits(ours)
    assert their_logits.dtype == our_logits.dtype
    if our_logits.dtype == torch.float32:
        assert_alike(their_logits, our_logits, SMALL_DECODER)
    else:  # fourteen results of each of two layers are stored, and two at the end
        assert_alike_in_mean(their_logits, our_logits, stores=2 * 14 + 2)


@pytest.mark.parametrize("row", [row for row in rows_of("from-peft.md") if row.section == "Settings"], ids=str)
def test_settings(row: Row, sides: tuple[Names, Names]) -> None:
    theirs, ours = sides
    wrapped = peft.get_peft_model(theirs["model"], eval(f"peft.LoraConfig({row.theirs})", theirs))
    config = eval(f"lk.LoraConfig({row.ours})", ours)
    add_adapter(ours["model"], config)
    assert meaning(wrapped) == meaning(ours["model"]) != {}
    if config.init_lora_weights == "gaussian":
        a = torch.cat([layer.lora_A["default"].detach().flatten() for layer in lora_layers(ours["model"]).values()])
        their_a = torch.cat([p.detach().flatten() for name, p in wrapped.named_parameters() if "lora_A" in name])
        for values in (a, their_a):
            assert float(values.std()) == pytest.approx(1 / config.r, rel=0.15)
    assert_alike(logits(wrapped), logits(ours["model"]), SMALL_DECODER)
    wrapped.save_pretrained(theirs["out"])
    save_adapter(ours["model"], ours["out"])
    saved, written = (load_file(names["out"] / "adapter_model.safetensors") for names in (theirs, ours))
    assert {key: (t.shape, t.dtype) for key, t in saved.items()} == {k: (t.shape, t.dtype) for k, t in written.items()}


def test_every_setting_of_ours_is_one_of_theirs() -> None:
    theirs = peft.LoraConfig().to_dict()
    assert set(LoraConfig.model_fields) - {"variant"} <= set(theirs)  # chooses what PEFT has no switch for
    differing = {
        name for name, value in LoraConfig().peft_values().items() if (value or None) != (theirs[name] or None)
    }
    assert differing == {"target_modules"}


@pytest.mark.parametrize("row", [row for row in rows_of("from-peft.md") if row.section != "Settings"], ids=str)
def test_from_peft(row: Row, sides: tuple[Names, Names], adapters: dict[str, Path]) -> None:
    theirs, ours = sides
    if row.section in ("Several adapters", "Merge", "Combine"):
        theirs["model"] = peft.PeftModel.from_pretrained(theirs["model"], adapters["default"])
        load_adapter(ours["model"], adapters["default"])
        if row.section != "Merge":
            theirs["model"].load_adapter(adapters["other"], "other")
            load_adapter(ours["model"], adapters["other"], "other")
            lorakit.set_adapter(ours["model"], "default")
        assert_same_model(theirs["model"], ours["model"])
    ours["before"] = {name: p.clone() for name, p in ours["model"].named_parameters()}
    before = [(names["model"], meaning(names["model"])) for names in sides]
    printed = run(row, sides)
    if check := CHECKS.get(row.task):
        check(theirs, ours, *printed)
    else:  # the row is about the model that it leaves
        assert any(
            names["model"] is not old or meaning(old) != was for names, (old, was) in zip(sides, before, strict=True)
        )
    if row.task == "swap other values in":  # ours keeps the slot's scaling and multiplies B by what is missing
        assert_alike(logits(theirs["model"]), logits(ours["model"]), SMALL_DECODER)
    else:
        assert_same_model(theirs["model"], ours["model"])


def trained(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what is trained, the adapter's name and PEFT's prefixes left out."""
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {re.sub(r"^base_model\.model\.|\.default|\.mine|\.weight", "", n): tuple(p.shape) for n, p in names.items()}


def see_what_is_trained(theirs: Names, ours: Names, their_text: str, our_text: str) -> None:
    assert their_text.startswith("trainable params: ")
    assert their_text.strip() in our_text


def is_trained_alike(theirs: Names, ours: Names, *_: str) -> None:
    assert trained(theirs["model"]) == trained(ours["model"]) != {}


def same_parameters(theirs: Names, ours: Names, *_: str) -> None:
    is_trained_alike(theirs, ours)
    their_group, our_group = (names["optimizer"].param_groups[0]["params"] for names in (theirs, ours))
    assert [p.shape for p in their_group] == [p.shape for p in our_group]
    assert our_group == adapter_parameters(ours["model"])


def same_learning_rates(theirs: Names, ours: Names, *_: str) -> None:
    named = {name: p for name, p in ours["model"].named_parameters() if p.requires_grad}
    built = build_optimizer(named, ours["config"])
    rates = [
        sorted((g["lr"], p.shape) for g in o.param_groups for p in g["params"]) for o in (theirs["optimizer"], built)
    ]
    assert rates[0] == rates[1]
    assert {rate for rate, _ in rates[1]} == {1e-4, 16e-4}


def same_files(theirs: Names, ours: Names, *_: str) -> None:
    folder = theirs["out"] / "other" if (theirs["out"] / "other").is_dir() else theirs["out"]
    their_tensors, our_tensors = (load_file(place / "adapter_model.safetensors") for place in (folder, ours["out"]))
    assert their_tensors.keys() == our_tensors.keys()
    assert all(torch.equal(tensor, our_tensors[name]) for name, tensor in their_tensors.items())


def same_configuration(theirs: Names, ours: Names, *_: str) -> None:
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora"):
        assert getattr(theirs["config"], name) == getattr(ours["config"], name)
    assert theirs["config"].target_modules == set(ours["config"].target_modules)


def same_matrices(theirs: Names, ours: Names, *_: str) -> None:
    for path, layer in ours["layers"].items():
        for key, matrix in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            assert torch.equal(theirs["tensors"].pop(f"base_model.model.{path}.{key}.weight"), matrix)
    assert not theirs["tensors"]


def same_logits_of_the_base(theirs: Names, ours: Names, *_: str) -> None:
    assert_alike(theirs["logits"], ours["logits"], SMALL_DECODER)
    assert not torch.allclose(ours["logits"], logits(ours["model"]), atol=1e-2)


def same_names(theirs: Names, ours: Names, *_: str) -> None:
    assert theirs["names"] == ours["names"] == list(adapter_configs(ours["model"]))


def same_delta(theirs: Names, ours: Names, *_: str) -> None:
    assert_alike(theirs["delta"], ours["delta"], terms=4 + 2)


def as_it_was(theirs: Names, ours: Names, *_: str) -> None:
    now = dict(ours["model"].named_parameters())
    assert now.keys() == ours["before"].keys()
    assert all(torch.equal(parameter, now[name]) for name, parameter in ours["before"].items())


def same_checkpoints(theirs: Names, ours: Names, *_: str) -> None:
    """Ours is in the dtype of the base, bf16: theirs, which is in fp32, rounded to nearest."""
    saved, written = (load_file(names["out"] / "model.safetensors") for names in (theirs, ours))
    assert saved.keys() == written.keys()
    for name, tensor in saved.items():
        assert written[name].dtype == torch.bfloat16
        # One rounding of a sum that is itself rounded: of ranks and the base.
        magnitude = tensor.abs() * unit(torch.bfloat16) + rounding(5 + 3, tensor.abs().max())
        assert_within(written[name], tensor, 1.01 * magnitude)
    theirs["model"], ours["model"] = (their_base(names["out"]) for names in (theirs, theirs))


def same_rows(theirs: Names, ours: Names, *_: str) -> None:
    assert_alike(theirs["logits"], ours["logits"], SMALL_DECODER)
    with lorakit.disable_adapters(ours["model"]):
        base = ours["model"](ours["pair"])
    assert_alike(ours["logits"][1], base[1], SMALL_DECODER)
    assert not torch.allclose(ours["logits"][0], base[0], atol=1e-2)


CHECKS: dict[str, Callable[..., None]] = {
    "attach an adapter": is_trained_alike,
    "give it a name": is_trained_alike,
    "see what is trained": see_what_is_trained,
    "make an optimizer": same_parameters,
    "use LoRA+": same_learning_rates,
    "load it to train on": is_trained_alike,
    "save": same_files,
    "read the configuration": same_configuration,
    "read the matrices": same_matrices,
    "compute without any": same_logits_of_the_base,
    "give each row its own": same_rows,
    "choose which is trained": is_trained_alike,
    "list them": same_names,
    "see an update": same_delta,
    "save one of them": same_files,
    "merge and go back": as_it_was,
    "write a merged checkpoint": same_checkpoints,
}


def test_each_check_belongs_to_a_row() -> None:
    assert CHECKS.keys() <= {row.task for row in rows_of("from-peft.md")}
