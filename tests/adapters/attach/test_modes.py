"""Attaching, loading, switching, merging and removing leave every module in the mode that it has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit import (
    LoraConfig,
    add_adapter,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from lorakit.layers import AdapterModule, Linear4bit

SETTINGS: dict[str, Any] = {
    "target_modules": ["first", "table", "conv"],
    "modules_to_save": ["norm", "head"],
    "lora_dropout": 0.5,
    "r": 2,
}


def mixed(training: bool) -> nn.Module:
    """Return a model in one mode, with parts in the other."""
    model = nn.ModuleDict(
        {
            "tower": nn.ModuleDict({"first": nn.Linear(8, 8), "table": nn.Embedding(5, 8), "conv": nn.Conv1d(3, 3, 1)}),
            "body": nn.ModuleDict({"first": Linear4bit.from_linear(nn.Linear(64, 8)), "router": nn.Linear(8, 2)}),
            "norm": nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.1)),
            "head": nn.Linear(8, 2),
        }
    ).train(training)
    model["tower"].train(not training)
    model["norm"][0].train(not training)
    return model


def modes(model: nn.Module) -> dict[str, bool]:
    """Return the mode of each module that is no adapter's own."""
    names = {path: module for path, module in model.named_modules() if not isinstance(module, AdapterModule)}
    return {
        path.replace(".base_layer", ""): module.training
        for path, module in names.items()
        if not any(part in path for part in ("lora_", "copies", "trained_bias"))
    }


def assert_follow(model: nn.Module) -> None:
    """Assert that what adapters hold has the mode of the module that it stands at."""
    for path, module in model.named_modules():
        if isinstance(module, AdapterModule):
            assert module.training == module.base_layer.training, path
            for inner, part in module.named_modules():
                if inner.startswith("copies.default."):
                    original = module.base_layer.get_submodule(inner.removeprefix("copies.default."))
                    assert part.training == original.training, (path, inner)
                elif inner and not inner.startswith("base_layer"):
                    assert part.training == module.training, (path, inner)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{}, {"bias": "all"}, {"use_dora": True}, {"target_parameters": ["router.weight"], "lora_dropout": 0.0}],
    ids=str,
)
def test_modes_stay(training: bool, settings: dict[str, Any], tmp_path: Path) -> None:
    model = mixed(training)
    before = modes(model)
    add_adapter(model, LoraConfig(**{**SETTINGS, **settings}))
    assert modes(model) == before
    assert_follow(model)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter", name="other")
    set_adapter(model, "other")
    set_adapter(model, "default")
    remove_adapter(model, "other")
    assert modes(model) == before
    assert_follow(model)
    merge_adapter(model)
    assert modes(model) == before
    unmerge_adapter(model)
    assert modes(model) == before
    assert_follow(model)
    remove_adapter(model)
    assert modes(model) == before


@pytest.mark.parametrize("training", [True, False])
def test_unmerged_layers_take_the_mode_that_the_model_has_by_then(training: bool) -> None:
    model = mixed(training)
    add_adapter(model, LoraConfig(**SETTINGS))
    merge_adapter(model)
    model.train(not training)
    model["norm"][1].train(training)
    before = modes(model)
    unmerge_adapter(model)
    assert modes(model) == before
    assert_follow(model)


def test_dropout_of_a_part_in_evaluation_mode_is_off() -> None:
    model = mixed(training=True)
    add_adapter(model, LoraConfig(**SETTINGS, init_lora_weights=False))
    first, x = model["tower"]["first"], torch.randn(4, 8)
    assert torch.equal(first(x), first(x))
    model.train()
    assert not torch.equal(first(x), first(x))
