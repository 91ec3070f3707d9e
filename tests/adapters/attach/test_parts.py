"""Adapters of a model's parts: calls on the whole, on a part, on copies and on wrappers are right or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made import small_decoder
from safetensors.torch import load_file
from torch import Tensor, nn

from lorakit import (
    LoraConfig,
    adapter_parameters,
    adapter_status,
    add_adapter,
    disable_adapters,
    inspect_adapter,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    set_adapter,
    set_trained,
    unmerge_adapter,
    use_rows,
)
from lorakit.adapters import adapter_modules, combine_adapters, idle_adapters
from lorakit.errors import AdapterError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
CONFIG = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)


class Two(nn.Module):
    """A model of two parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vision, self.text = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.vision(x), self.text(x)])


class Wrapper(nn.Module):
    """A user's own module around a model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


def two(vision: str = "default", text: str = "default") -> Two:
    model = Two()
    add_adapter(model.vision, CONFIG, vision)
    add_adapter(model.text, CONFIG, text)
    return model


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(X)
    return result


BARE = out(Two())


def which(model: nn.Module) -> tuple[bool, bool]:
    """Whether vision and text differ from the base model."""
    vision, text = out(model)
    return not torch.equal(vision, BARE[0]), not torch.equal(text, BARE[1])


class TestTheWhole:
    def test_disabling_reaches_all_parts_and_nothing_else_changes(self) -> None:
        model = two()
        with disable_adapters(model):
            assert which(model) == (False, False)
            with disable_adapters(model.text):
                assert which(model) == (False, False)
            assert which(model) == (False, False)
        assert which(model) == (True, True)
        with disable_adapters(model.text):
            assert which(model) == (True, False)
        assert which(model) == (True, True)

    def test_switching_and_training_by_name(self) -> None:
        model = two("v", "t")
        set_adapter(model, "t")
        assert which(model) == (False, True) and idle_adapters(model) == ["v"]
        set_adapter(model, ["v", "t"])
        assert which(model) == (True, True)
        set_adapter(model, [])
        assert which(model) == (False, False)
        set_trained(model, "v")
        assert [p.requires_grad for p in adapter_parameters(model)] == [True, True, False, False]
        assert len(adapter_parameters(model, "v")) == 2
        with pytest.raises(AdapterError, match=r"no adapter 'w'.*attached: v, t"):
            set_adapter(model, "w")

    def test_rows(self) -> None:
        model = two("v", "t")
        with use_rows(model, ["v", "t", "__base__"]):
            rows = out(model)
        vision, text = (rows != BARE).any(-1)
        assert vision.tolist() == [True, False, False] and text.tolist() == [False, True, False]
        assert which(model) == (True, True)

    def test_one_of_the_parts_is_saved_merged_and_removed_by_name(self, tmp_path: Path) -> None:
        model, alone = two("v", "t"), two("v", "t").text
        save_adapter(model, tmp_path / "whole", "t")
        save_adapter(alone, tmp_path / "part", "t")
        assert load_file(tmp_path / "whole" / "adapter_model.safetensors").keys() == {
            "base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"
        }  # fmt: skip
        fresh = Two()
        load_adapter(fresh.text, tmp_path / "whole", "t")
        before = out(model)
        assert torch.equal(out(fresh)[1], before[1])
        merge_adapter(model, "t")
        assert which(model) == (True, True) and adapter_status(model).adapters["t of text"].merged
        merge_adapter(model, "v")
        unmerge_adapter(model)
        assert torch.equal(out(model), before)
        remove_adapter(model, "v")
        assert which(model) == (False, True)

    @pytest.mark.parametrize(
        "call",
        [
            lambda model, folder: save_adapter(model, folder),
            lambda model, folder: merge_adapter(model),
            lambda model, folder: remove_adapter(model),
            lambda model, folder: add_adapter(model, LoraConfig(r=2), "new"),
            lambda model, folder: load_adapter(model, save_adapter(two().text, folder), "new"),
            lambda model, folder: combine_adapters(model, {"default": 1.0}, "new"),
        ],
    )
    def test_what_would_mix_two_adapters_of_one_name_is_refused(
        self, call: Callable[[nn.Module, Path], object], tmp_path: Path
    ) -> None:
        model = two()
        before = out(model)
        with pytest.raises(
            AdapterError, match=r"parts of the model have adapters.*vision \(default\).*text \(default\)"
        ):
            call(model, tmp_path / "adapter")
        assert torch.equal(out(model), before)

    def test_the_status_names_the_parts(self) -> None:
        status = adapter_status(two())
        assert list(status.adapters) == ["default of vision", "default of text"]
        assert status.irregularities == [] and status.also_trained == 0

    def test_a_part_that_the_adapter_of_the_whole_leaves_alone_may_have_its_own(self, tmp_path: Path) -> None:
        model = Two()
        add_adapter(model, CONFIG.model_copy(update={"target_modules": ["text.0"]}))
        add_adapter(model.vision, CONFIG)
        with disable_adapters(model):
            assert which(model) == (False, False)
        set_adapter(model.vision, [])
        assert which(model) == (False, True)
        set_adapter(model, "default")
        assert which(model) == (True, True)
        assert list(adapter_modules(model)) == ["text.0"] and list(adapter_modules(model.vision)) == ["0"]
        with pytest.raises(AdapterError, match="parts of the model"):
            save_adapter(model, tmp_path / "adapter")


class TestAPart:
    """Calls on a part, of adapters of the whole."""

    CALLS = (
        lambda part, folder: disable_adapters(part).__enter__(),
        lambda part, folder: set_adapter(part, []),
        lambda part, folder: set_trained(part, []),
        lambda part, folder: use_rows(part, ["__base__"] * 3).__enter__(),
        lambda part, folder: save_adapter(part, folder),
        lambda part, folder: merge_adapter(part),
        lambda part, folder: unmerge_adapter(part),
        lambda part, folder: remove_adapter(part),
        lambda part, folder: adapter_status(part),
        lambda part, folder: inspect_adapter(part),
        lambda part, folder: add_adapter(part, CONFIG, "new"),
    )

    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize("asked_before", [False, True])
    def test_they_are_refused(
        self, call: Callable[[nn.Module, Path], object], asked_before: bool, tmp_path: Path
    ) -> None:
        model = Two()
        if asked_before:
            adapter_status(model.text)  # it has an empty record since
        add_adapter(model, LoraConfig(r=2, init_lora_weights=False))
        before = out(model)
        with pytest.raises(AdapterError, match="the model that add_adapter was called with"):
            call(model.text, tmp_path / "adapter")
        assert torch.equal(out(model), before)

    @pytest.mark.parametrize("call", CALLS)
    def test_so_are_they_on_a_copy_and_in_another_model(
        self, call: Callable[[nn.Module, Path], object], tmp_path: Path
    ) -> None:
        model = Two()
        add_adapter(model, LoraConfig(r=2, init_lora_weights=False))
        for part in (copy.deepcopy(model.text), nn.Sequential(copy.deepcopy(model.text))):
            before = out(part)
            with pytest.raises(AdapterError, match="'default', which the record of this model does not have"):
                call(part, tmp_path / "adapter")
            assert torch.equal(out(part), before)


class TestCopies:
    def test_a_copied_model_is_on_its_own(self) -> None:
        model = two()
        other = copy.deepcopy(model)
        set_adapter(other, [])
        assert which(other) == (False, False) and which(model) == (True, True)

    def test_a_copied_layer_follows_the_model_that_it_is_put_into(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
        add_adapter(model, LoraConfig(r=2, init_lora_weights=False))
        model.append(copy.deepcopy(model[0]))
        active = out(model)
        with disable_adapters(model):
            bare = out(model)
        set_adapter(model, [])
        assert torch.equal(out(model), bare) and not torch.equal(bare, active)
        set_adapter(model, "default")
        torch.manual_seed(0)
        assert len(load_file(save_adapter(model, tmp_path / "a") / "adapter_model.safetensors")) == 4
        assert adapter_status(model).irregularities == []

    def test_a_part_with_its_own_adapter_can_move(self) -> None:
        model = two()
        other = nn.Sequential(model.text)
        with disable_adapters(other):
            assert torch.equal(out(other), BARE[1])
        remove_adapter(other)
        assert which(model) == (True, False)


class TestAUsersWrapper:
    @pytest.mark.parametrize("is_first", [True, False])
    def test_it_stands_for_the_model_inside(self, is_first: bool, tmp_path: Path) -> None:
        model = small_decoder()
        add_adapter(model, LoraConfig(r=2, init_lora_weights=False))
        around = Wrapper(model)
        save_adapter(model, tmp_path / "model")
        save_adapter(around, tmp_path / "around")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "around" / name).read_bytes()
        load_adapter(around, tmp_path / "around", "second")
        assert list(adapter_status(model).adapters) == ["default", "second"]
        with disable_adapters(around):
            assert torch.equal(around(torch.tensor([[1, 2]])), small_decoder()(torch.tensor([[1, 2]])))
