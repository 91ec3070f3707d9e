"""Combining and resizing on models and on folders: the sums of what the layers do, and nothing else touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import assert_alike, assert_within, factored, rounding
from torch import Tensor, nn

from lorakit.adapters import (
    LoraConfig,
    add_adapter,
    combine_adapters,
    combine_folders,
    load_adapter,
    lora_layers,
    read_adapter_folder,
    resize_adapter,
    resize_folder,
    save_adapter,
)
from lorakit.errors import AdapterError, CheckpointError, ConfigError

NAMES = ("up", "down", "gate")
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["up", "down"]},
    "rslora": {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["up", "gate"]},
    "patterns": {
        "r": 3, "lora_alpha": 6, "target_modules": list(NAMES),
        "rank_pattern": {"1.up": 5}, "alpha_pattern": {"gate": 1},
    },
}  # fmt: skip


# A distance relative to the norm of an update of at most 14 x 10, of which `assert_same_deltas` tells the roundings.
OFF = rounding(3 + 15 + factored(14, 10), 1.0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(10, 14), nn.Linear(10, 14, bias=False), nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x) * self.gate(x).sigmoid())


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


@pytest.fixture
def model() -> nn.Module:
    """A model with the three adapters of CONFIGS, their B random."""
    model = new_model()
    for name, config in CONFIGS.items():
        add_adapter(model, LoraConfig(**config, init_lora_weights=False), name)
    return model


@pytest.fixture
def folders(model: nn.Module, tmp_path: Path) -> dict[str, Path]:
    return {name: save_adapter(model, tmp_path / name, name) for name in CONFIGS}


def deltas(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {path: layer.delta_weight(name).detach().double() for path, layer in lora_layers(model, name).items()}


def expected_sum(model: nn.Module, weights: Mapping[str, float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for path, delta in deltas(model, name).items():
            total[path] = total.get(path, torch.zeros_like(delta)) + weight * delta
    return total


def assert_same_deltas(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for path, delta in expected.items():
        # B, A and the scaling are written in fp32: three roundings of what is at most 15 ranks' sum.
        assert_alike(found[path].float(), delta.float(), terms=3 + 15)


WEIGHTS = {"plain": 0.7, "rslora": -1.5, "patterns": 1.0}


def test_a_weighted_sum_of_different_ranks_layers_and_scalings(model: nn.Module) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = expected_sum(model, WEIGHTS)
    report = combine_adapters(model, WEIGHTS, "all")
    assert_same_deltas(deltas(model, "all"), expected)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    for path, layer in lora_layers(model, "all").items():
        assert layer.scaling["all"] == 1
        assert layer.active == ("all",)
        assert len(layer.lora_A["all"]) == report.ranks[path] == min(sum(layer_ranks(model, path)), 10)
    assert report.error == 0
    assert str(report).splitlines()[0] == "linear: 0.7 x plain + -1.5 x rslora + 1 x patterns"


def layer_ranks(model: nn.Module, path: str) -> list[int]:
    layer = lora_layers(model)[path]
    return [len(layer.lora_A[name]) for name in CONFIGS if name in layer.lora_A]


def test_the_difference_of_an_adapter_and_its_copy_is_nothing(model: nn.Module) -> None:
    resize_adapter(model, "plain", "twin", rank=4)
    assert_same_deltas(deltas(model, "twin"), deltas(model, "plain"))
    combine_adapters(model, {"plain": 1, "twin": -1}, "difference")
    copied = deltas(model, "plain")
    for path, delta in deltas(model, "difference").items():
        assert_within(delta, torch.zeros_like(delta), 2 * rounding(3 + 15, copied[path].abs().max()))


@pytest.mark.parametrize(
    "how", [{}, {"method": "cat"}, {"method": "svd", "rank": 3}, {"method": "ties", "density": 0.3, "rank": 5}], ids=str
)
def test_folders_give_what_the_model_gives(
    model: nn.Module, folders: dict[str, Path], tmp_path: Path, how: dict[str, Any]
) -> None:
    report = combine_adapters(model, WEIGHTS, "all", **how)
    by_path = {folders[name]: weight for name, weight in WEIGHTS.items()}
    from_files = combine_folders(by_path, tmp_path / "all", **how)
    assert from_files.ranks == report.ranks
    assert_within(from_files.error, report.error, OFF)
    fresh = new_model()
    load_adapter(fresh, tmp_path / "all", "all")
    assert_same_deltas(deltas(fresh, "all"), deltas(model, "all"))
    config = json.loads((tmp_path / "all" / "adapter_config.json").read_text())
    assert config["use_rslora"] is False
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]


@pytest.mark.parametrize("how", [{"rank": 2}, {"energy": 0.6}, {"parameters": 150}], ids=str)
def test_resizing_a_model_and_a_folder(
    model: nn.Module, folders: dict[str, Path], tmp_path: Path, how: dict[str, Any]
) -> None:
    expected = deltas(model, "patterns")
    report = resize_adapter(model, "patterns", "small", **how)
    found = deltas(model, "small")
    assert_same_deltas(deltas(model, "patterns"), expected)
    for layer in report.layers:
        delta = expected[layer.path]
        missing = torch.linalg.svdvals(delta)[layer.rank :].norm() / delta.norm()
        assert_within(layer.error, missing, OFF)
        kept = found.get(layer.path, torch.zeros_like(delta))
        assert_within((kept - delta).norm() / delta.norm(), layer.error, OFF)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == report.parameters
    resize_folder(folders["patterns"], tmp_path / "small", **how)
    fresh = new_model()
    load_adapter(fresh, tmp_path / "small", "small")
    assert_same_deltas(deltas(fresh, "small"), found)


def test_embeddings_and_convolutions_in_folders(tmp_path: Path) -> None:
    """As PEFT shapes them: (r, vocab), (dim, r); (r, in, 3, 3), (out, r, 1, 1)."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "embed.lora_embedding_A": torch.randn(2, 30, generator=generator),
        "embed.lora_embedding_B": torch.randn(8, 2, generator=generator),
        "conv.lora_A.weight": torch.randn(2, 4, 3, 3, generator=generator),
        "conv.lora_B.weight": torch.randn(6, 2, 1, 1, generator=generator),
    }
    source = tmp_path / "source"
    source.mkdir()
    save_file(
        {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, source / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["embed", "conv"], "task_type": "X"}
    (source / "adapter_config.json").write_text(json.dumps(config))
    combine_folders({source: 1.5, str(source): 0.5}, tmp_path / "sum")
    before, after = read_adapter_folder(source), read_adapter_folder(tmp_path / "sum")
    assert after.config["task_type"] == "X"
    for path, layer in before.layers.items():
        result = after.layers[path]
        assert result.kind == layer.kind
        assert_alike(result.update().dense().float(), 2 * layer.update().dense().float(), terms=3 + 4)
    assert after.layers["conv"].lora_A.shape == (4, 4, 3, 3)
    assert after.layers["conv"].lora_B.shape == (6, 4, 1, 1)
    assert after.layers["embed"].lora_A.shape == (4, 30)


class Mixed(nn.Module):
    """A layer of each kind whose update is one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.out = nn.Embedding(30, 8), nn.Conv2d(4, 6, 3), nn.Linear(8, 5)


def test_embeddings_and_convolutions_in_a_model() -> None:
    torch.manual_seed(0)
    model = Mixed()
    for name, rank in (("first", 3), ("second", 2)):
        config = LoraConfig(r=rank, target_modules=["embed", "conv", "out"], init_lora_weights=False)
        add_adapter(model, config, name)
    expected = expected_sum(model, {"first": 1.5, "second": -0.5})
    combine_adapters(model, {"first": 1.5, "second": -0.5}, "both")
    assert_same_deltas(deltas(model, "both"), expected)
    report = resize_adapter(model, "both", "small", rank=2)
    for layer in report.layers:
        delta = deltas(model, "small")[layer.path] - expected[layer.path]
        assert_within(delta.norm(), layer.error * layer.norm, OFF * layer.norm)


def test_the_start_of_pissa_is_part_of_its_update() -> None:
    """In the model the start is known: the update is what training changed, and that is combined."""
    torch.manual_seed(0)
    model = Mixed()
    add_adapter(model, LoraConfig(r=2, target_modules=["out"], init_lora_weights="pissa"), "pissa")
    with torch.no_grad():
        lora_layers(model, "pissa")["out"].lora_B["pissa"].add_(0.1)
    expected = deltas(model, "pissa")
    assert expected["out"].norm() > 0.1
    combine_adapters(model, {"pissa": 1.0}, "plain")
    assert_same_deltas(deltas(model, "plain"), expected)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora_bias": True}, "lora_bias of out"),
        ({"bias": "all"}, "more than low-rank"),
        ({"modules_to_save": ["conv"]}, "conv"),
    ],
    ids=str,
)
def test_adapters_that_hold_more_are_refused(more: dict[str, Any], message: str) -> None:
    model = Mixed()
    add_adapter(model, LoraConfig(r=2, target_modules=["out"], **more), "more")
    with pytest.raises(AdapterError, match=message):
        combine_adapters(model, {"more": 1}, "new")
    with pytest.raises(AdapterError, match=message):
        resize_adapter(model, "more", "new", rank=1)


def test_folders_of_different_models_are_not_combined(folders: dict[str, Path], tmp_path: Path) -> None:
    other = new_model()
    with torch.no_grad():
        next(p for p in other.parameters() if p.ndim == 1).add_(1)
    add_adapter(other, LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    save_adapter(other, tmp_path / "other")
    with pytest.raises(AdapterError, match=r"of different base models: .*plain .*other"):
        combine_folders({folders["plain"]: 1, tmp_path / "other": 1}, tmp_path / "new")
    resize_folder(tmp_path / "other", tmp_path / "small", rank=1)  # the new folder still says whose it is
    with pytest.raises(CheckpointError, match="another base model"):
        load_adapter(new_model(), tmp_path / "small")


def test_the_dtype_of_a_file_is_chosen(folders: dict[str, Path], tmp_path: Path) -> None:
    resize_folder(folders["plain"], tmp_path / "half", rank=2, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "half" / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_dora_is_refused_and_says_why(model: nn.Module, tmp_path: Path) -> None:
    add_adapter(model, LoraConfig(r=2, use_dora=True), "dora")
    for call in (
        lambda: combine_adapters(model, {"plain": 1, "dora": 1}, "new"),
        lambda: resize_adapter(model, "dora", "new", rank=1),
    ):
        with pytest.raises(AdapterError, match=r"adapter 'dora' is a DoRA adapter: its change of the base.*low rank"):
            call()
        assert not lora_layers(model, "new")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'.*changed the base"),
        ({"target_parameters": ["experts"]}, "several matrices"),
    ],
)
def test_folders_that_mean_more_are_refused(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    file = folders["plain"] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterError, match=message):
        combine_folders({folders["plain"]: 1, folders["rslora"]: 1}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_other_tensors_are_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    file = folders["plain"] / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.head.weight": torch.ones(2, 2)}, file)
    with pytest.raises(AdapterError, match=r"more than low-rank updates: head\.weight"):
        resize_folder(folders["plain"], tmp_path / "new", rank=1)


def test_a_failed_call_changes_nothing(model: nn.Module, folders: dict[str, Path], tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match="no adapter 'plian'; did you mean 'plain'"):
        combine_adapters(model, {"plian": 1}, "new")
    with pytest.raises(AdapterError, match="already has an adapter 'plain'"):
        combine_adapters(model, {"rslora": 1}, "plain")
    with pytest.raises(AdapterError, match="already has an adapter 'plain'"):
        resize_adapter(model, "rslora", "plain", rank=1)
    with pytest.raises(AdapterError, match="0 adapters"):
        combine_adapters(model, {}, "new")
    with pytest.raises(AdapterError, match="nothing is left"):
        resize_adapter(model, "plain", "new", parameters=1)
    with pytest.raises(ConfigError, match="density"):
        combine_adapters(model, {"plain": 1}, "new", "ties")
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match="not an adapter folder"):
        resize_folder(folders["plain"], tmp_path / "taken", rank=1)
    assert (tmp_path / "taken" / "notes.txt").read_text() == "mine"
    with pytest.raises((AdapterError, CheckpointError)):
        combine_folders({tmp_path / "absent": 1}, tmp_path / "new")
    assert not (tmp_path / "new").exists()
