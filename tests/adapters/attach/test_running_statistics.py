"""Modules trained in full that have buffers: each copy has its own running statistics."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import assert_alike
from torch import Tensor, nn

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
from lorakit.adapters import adapter_parameters
from lorakit.errors import CheckpointError
from lorakit.layers import SavedModule

STATS = 64  # roundings through a small net of two layers of eight


def config(**values: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["proj"], "init_lora_weights": False} | values)


@torch.no_grad()
def shake(model: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in adapter_parameters(model):
        parameter.add_(torch.randn_like(parameter) / 5)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.head = nn.Linear(8, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.proj(x))
        return y


class TestRunningStatistics:
    def trained(self, names: list[str]) -> tuple[Normed, Normed]:
        torch.manual_seed(0)
        base = Normed()
        model = copy.deepcopy(base).train()
        for shift, name in enumerate(names):
            add_adapter(model, config(modules_to_save=["head"]), name)
            for _ in range(5):
                model(3 * torch.randn(16, 8) + 5 * (shift + 1))
        return base.eval(), model.eval()

    def test_they_are_saved_loaded_merged_and_unmerged(self, tmp_path: Path) -> None:
        base, model = self.trained(["default"])
        x = 3 * torch.randn(4, 8) + 5
        expected, before = model(x), {key: buffer.clone() for key, buffer in base.named_buffers()}
        folder = save_adapter(model, tmp_path / "adapter")
        counter = load_file(folder / "adapter_model.safetensors")["base_model.model.head.0.num_batches_tracked"]
        assert counter.dtype == torch.int64 and int(counter) == 5
        other = copy.deepcopy(base)
        load_adapter(other, folder)
        assert torch.equal(other(x), expected)
        merge_adapter(model)
        assert_alike(model(x), expected, STATS)
        assert not any(isinstance(module, SavedModule) for module in model.modules())
        assert int(model.head[0].num_batches_tracked) == 5
        unmerge_adapter(model)
        assert torch.equal(model(x), expected)
        remove_adapter(model)
        assert all(torch.equal(buffer, before[key]) for key, buffer in model.named_buffers())

    def test_each_adapter_has_its_own(self) -> None:
        _, model = self.trained(["a", "b"])
        x = torch.randn(4, 8)
        set_adapter(model, "a")
        first = model(x)
        set_adapter(model, "b")
        assert not torch.allclose(model(x), first)
        set_adapter(model, "a")
        assert torch.equal(model(x), first)

    @pytest.mark.parametrize(
        ("key", "message"), [("running_var", "is missing"), ("num_batches_tracked", "torch.int64")]
    )
    def test_a_file_without_them_is_refused(self, key: str, message: str, tmp_path: Path) -> None:
        base, model = self.trained(["default"])
        folder = save_adapter(model, tmp_path / "adapter")
        tensors = load_file(folder / "adapter_model.safetensors")
        value = tensors.pop(f"base_model.model.head.0.{key}")
        tensors |= {f"base_model.model.head.0.{key}": value.float()} if "int64" in message else {}
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=rf"head\.0\.{key} .*{message}"):
            load_adapter(base, folder)

    def test_a_narrower_file_keeps_the_counter(self, tmp_path: Path) -> None:
        base, model = self.trained(["default"])
        load_adapter(base, save_adapter(model, tmp_path / "adapter", dtype=torch.bfloat16))
        assert base.head.copies["default"][0].num_batches_tracked.dtype == torch.int64

    def test_a_merge_reaches_the_copies_of_other_adapters(self) -> None:
        """A copy of the bias shares the weight, which the merged one replaces."""
        torch.manual_seed(0)
        model = nn.ModuleDict({"proj": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
        add_adapter(model, config(target_modules=[], modules_to_save=["head"]), "whole")
        shake(model)
        add_adapter(model, config(bias="all"), "bias")
        weight = model["head"].copies["whole"].weight
        merge_adapter(model, "whole")
        set_adapter(model, "bias")
        x = torch.randn(2, 4)
        assert torch.equal(model["head"](x), nn.functional.linear(x, weight, model["head"].copies["bias"].bias))
        unmerge_adapter(model)
        assert model["head"].copies["bias"].weight is model["head"].base_layer.weight
