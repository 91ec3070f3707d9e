"""Active and trained as two states, hot swap in place, host memory, and the status that tells of all of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from made import conversations, small_decoder, small_tokenizer
from safetensors.torch import load_file, save_file
from tolerances import assert_alike
from torch import Tensor, nn

from lorakit import (
    LoraConfig,
    TrainConfig,
    adapter_parameters,
    adapter_status,
    add_adapter,
    disable_adapters,
    load_adapter,
    merge_adapter,
    quantize,
    remove_adapter,
    save_adapter,
    set_adapter,
    set_trained,
    swap_adapter,
    train,
    unmerge_adapter,
    use_rows,
)
from lorakit.adapters import idle_adapters, lora_layers, offload_adapter, onload_adapter
from lorakit.errors import AdapterError, CheckpointError, TrainingError
from lorakit.layers import Linear4bit, LoRALinear

# Roundings through `mlp`: sums over 6, 8 and 8 inputs and 2 or 3 ranks each, with DoRA's norms over as many.
TERMS = 2 * (6 + 8 + 8) + 3 * 6


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4, bias=False)))


def config(r: int = 2, **values: Any) -> LoraConfig:
    return LoraConfig(r=r, init_lora_weights=False, **values)


def three() -> nn.Sequential:
    model = mlp()
    add_adapter(model, config(), "a")
    add_adapter(model, config(target_modules=["2.1"]), "b")
    add_adapter(model, config(r=3, use_dora=True), "c")
    return model


def trained(model: nn.Module) -> set[str]:
    """The adapters of which any parameter gets a gradient, and what else does."""
    return {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}


class TestActiveAndTrained:
    def test_each_changes_without_the_other(self) -> None:
        model = three()
        assert trained(model) == {"c"}
        outputs = {}
        for name in ("a", "b", "c"):
            set_adapter(model, name)
            outputs[name] = model(X)
            assert trained(model) == {"c"}
        set_trained(model, ["a", "b"])
        assert trained(model) == {"a", "b"} and torch.equal(model(X), outputs["c"])
        set_trained(model, [])
        assert trained(model) == set() and torch.equal(model(X), outputs["c"])

    def test_an_evaluation_in_between_does_not_change_what_is_trained(self) -> None:
        model = three()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for name in ("c", "a", "c"):
            set_adapter(model, name)
            optimizer.zero_grad()
            if name == "c":
                model(X).sum().backward()
                optimizer.step()
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed and all(name.endswith(".c") for name in changed)

    def test_one_trained_above_a_frozen_one(self) -> None:
        model = three()
        set_adapter(model, ["a", "c"])
        model(X).sum().backward()
        assert all(p.grad is None for p in adapter_parameters(model, "a"))
        assert all(p.grad is not None for p in adapter_parameters(model, "c"))

    def test_loading_takes_training_from_no_one(self, tmp_path: Path) -> None:
        model = three()
        save_adapter(model, tmp_path / "a", "a")
        load_adapter(model, tmp_path / "a", "reference")
        assert trained(model) == {"c"} and {layer.active for layer in lora_layers(model).values()} == {("reference",)}
        load_adapter(model, tmp_path / "a", "more", trained=True)
        assert trained(model) == {"more"}

    def test_what_else_is_trained_stays_so(self) -> None:
        model = three()
        model[0].base_layer.bias.requires_grad_(True)
        set_adapter(model, "a")
        set_trained(model, "a")
        add_adapter(model, config(), "new")
        assert trained(model) == {"new", "bias"}
        remove_adapter(model, "new")
        assert trained(model) == {"bias"}

    def test_the_trainer_refuses_an_adapter_that_nothing_would_reach(self, tmp_path: Path) -> None:
        model, tok = small_decoder(), small_tokenizer(tmp_path)
        add_adapter(model, config(), "a")
        add_adapter(model, config(), "b")
        set_adapter(model, "a")
        with pytest.raises(TrainingError, match="'b' is to be trained but is not active"):
            train(model, tok, conversations(2), TrainConfig(max_steps=1, progress=False))
        set_trained(model, [])
        with pytest.raises(TrainingError, match="set_trained"):
            train(model, tok, conversations(2), TrainConfig(max_steps=1, progress=False))
        set_trained(model, "a")
        train(model, tok, conversations(2), TrainConfig(max_steps=1, progress=False))

    def test_unknown_names_change_nothing(self) -> None:
        model = three()
        for call in (set_trained, set_adapter, offload_adapter, onload_adapter):
            with pytest.raises(AdapterError, match="no adapter 'x'"):
                call(model, ["a", "x"])
        assert trained(model) == {"c"} and idle_adapters(model) == []

    def test_switching_while_disabled_waits_for_the_end(self) -> None:
        model = three()
        base = mlp()(X)
        with disable_adapters(model):
            set_adapter(model, "a")
            assert torch.equal(model(X), base)
            add_adapter(model, config(), "new")
            assert torch.equal(model(X), base)
            set_adapter(model, "a")
        assert {layer.active for layer in lora_layers(model).values()} == {("a",)}

    def test_modules_attached_to_a_copy_are_the_copys(self) -> None:
        model = three()
        twin = copy.deepcopy(model)
        set_adapter(twin, "a")
        assert {layer.active for layer in lora_layers(model).values()} == {("c",)}
        assert {layer.active for layer in lora_layers(twin).values()} == {("a",)}

    def test_a_merge_comes_back_as_it_went(self) -> None:
        model = three()
        remove_adapter(model, "c")
        set_adapter(model, ["b", "a"])
        set_trained(model, ["a", "b"])
        before = model(X)
        merge_adapter(model, "a")
        assert trained(model) == {"b"} and adapter_status(model).adapters["a"].merged
        with use_rows(model, ["b"] * 5), pytest.raises(AdapterError, match="in use by a row"):
            merge_adapter(model, "b")
        with disable_adapters(model):
            unmerge_adapter(model)
        assert torch.equal(model(X), before) and trained(model) == {"a", "b"}


class TestHotSwap:
    def saved(self, folder: Path, **values: Any) -> tuple[Path, nn.Module]:
        """Another adapter of the same model, on disk, and a model that computes with it."""
        other = mlp()
        torch.manual_seed(1)
        add_adapter(other, config(**values))
        return save_adapter(other, folder / "other"), other

    def test_the_values_come_and_the_memory_stays(self, tmp_path: Path) -> None:
        folder, other = self.saved(tmp_path)
        model = three()
        set_adapter(model, "a")
        parameters = adapter_parameters(model, "a")
        places, flags = [p.data_ptr() for p in parameters], trained(model)
        swap_adapter(model, "a", folder)
        assert torch.equal(model(X), other(X))
        assert all(p is q for p, q in zip(parameters, adapter_parameters(model, "a"), strict=True))
        assert [p.data_ptr() for p in parameters] == places and trained(model) == flags
        swap_adapter(model, "a", load_file(folder / "adapter_model.safetensors"))
        assert torch.equal(model(X), other(X))

    @pytest.mark.parametrize("values", [{"r": 1, "lora_alpha": 5}, {"r": 2, "use_rslora": True}, {"use_dora": True}])
    def test_smaller_ranks_and_other_scalings(self, tmp_path: Path, values: dict[str, Any]) -> None:
        folder, other = self.saved(tmp_path, **values)
        model = mlp()
        add_adapter(model, config(r=4, use_dora=values.get("use_dora", False)), "slot")
        scaling = lora_layers(model)["0"].scaling["slot"]
        swap_adapter(model, "slot", folder)
        assert_alike(model(X), other(X), TERMS)
        assert lora_layers(model)["0"].scaling["slot"] == scaling
        load_adapter(other, save_adapter(model, tmp_path / "again", "slot"), "again")  # and saved, it is the same
        assert_alike(model(X), other(X), TERMS)

    def test_float64_keeps_its_digits(self, tmp_path: Path) -> None:
        folder, _ = self.saved(tmp_path)
        tensors = {key: t.double() + 1e-12 for key, t in load_file(folder / "adapter_model.safetensors").items()}
        model = mlp().double()
        add_adapter(model, config(), dtype=torch.float64)
        swap_adapter(model, "default", tensors)
        layer = lora_layers(model)["0"]
        for matrix, key in ((layer.lora_A["default"], "lora_A"), (layer.lora_B["default"], "lora_B")):
            assert torch.equal(matrix, tensors[f"base_model.model.0.{key}.weight"])

    def test_a_captured_optimizer_goes_on(self, tmp_path: Path) -> None:
        folder, _ = self.saved(tmp_path)
        model = mlp()
        add_adapter(model, config())
        optimizer = torch.optim.AdamW(adapter_parameters(model))
        model(X).sum().backward()
        optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        swap_adapter(model, "default", folder)
        for number, values in optimizer.state_dict()["state"].items():
            assert all(torch.equal(values[key], state["state"][number][key]) for key in values)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"r": 3}, r"0: its rank 3 is larger than the 2 allotted\n  2\.0: its rank 3"),
            ({"target_modules": ["2.1"]}, r"0 is missing\n  2\.0 is missing"),
            ({"use_dora": True}, r"0: it has magnitudes \(DoRA\), unlike"),
        ],
    )
    def test_what_does_not_fit_changes_nothing(self, tmp_path: Path, values: dict[str, Any], message: str) -> None:
        folder, _ = self.saved(tmp_path, **values)
        self.refused(folder, message)

    def test_tensors_that_do_not_fit(self, tmp_path: Path) -> None:
        folder, _ = self.saved(tmp_path)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        first, last = (f"base_model.model.{path}.lora_A.weight" for path in ("0", "2.1"))
        self.refused(tensors | {"x.lora_A.weight": torch.ones(2, 2)}, "x.lora_A.weight belongs to no layer")
        self.refused({key: t for key, t in tensors.items() if key != last}, r"2\.1 is missing")
        self.refused(tensors | {last: torch.full((2, 8), float("nan"))}, r"2\.1: it holds inf, nan")
        self.refused(tensors | {first: torch.ones(2, 7)}, r"0: lora_A \(2, 7\) and lora_B \(8, 2\) do not fit")
        save_file(tensors | {last: torch.full((2, 8), float("inf"))}, file)
        self.refused(folder, "inf or nan")
        save_file(tensors | {"base_model.model.2.1.weight": torch.ones(4, 8)}, file)
        self.refused(folder, r"2\.1\.weight is not a low-rank matrix")

    def refused(self, source: Any, message: str) -> None:
        model = three()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.raises(CheckpointError, match=message):
            swap_adapter(model, "a", source)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    def test_an_unknown_slot(self, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="no adapter 'x'"):
            swap_adapter(three(), "x", tmp_path)

    def test_a_compiled_model_is_not_compiled_again(self, tmp_path: Path) -> None:
        folder, other = self.saved(tmp_path, r=1, lora_alpha=3)
        model = mlp()
        add_adapter(model, config(r=2), "slot")
        set_trained(model, [])
        graphs: list[torch.fx.GraphModule] = []

        def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            graphs.append(graph)
            return graph

        compiled = torch.compile(model, backend=count)
        first = compiled(X)
        seen = len(graphs)
        assert seen
        for _ in range(2):
            swap_adapter(model, "slot", folder)
            assert_alike(compiled(X), other(X), TERMS)
        assert len(graphs) == seen and not torch.equal(first, compiled(X))


class TestHostMemory:
    def test_in_use_or_not_nothing_that_is_computed_changes(self) -> None:
        model = three()
        outputs = {}
        for name in ("a", "b", "c"):
            set_adapter(model, name)
            outputs[name] = model(X)
        set_trained(model, [])
        objects = {name: [id(p) for p in adapter_parameters(model, name)] for name in "abc"}
        offload_adapter(model, ["a", "b", "c"])
        assert all(info.on_host for info in adapter_status(model).adapters.values())
        for name in ("b", "c", "a"):
            set_adapter(model, name)
            assert torch.equal(model(X), outputs[name])
        with use_rows(model, ["a", "b", "c", "b", "__base__"]):
            rows = model(X)
        assert_alike(rows[1], outputs["b"][1], TERMS)
        assert objects == {name: [id(p) for p in adapter_parameters(model, name)] for name in "abc"}
        onload_adapter(model, ["a", "b"])
        assert [info.on_host for info in adapter_status(model).adapters.values()] == [False, False, True]
        remove_adapter(model, "c")
        add_adapter(model, config(), "c")
        assert not adapter_status(model).adapters["c"].on_host

    def test_an_adapter_in_training_stays(self) -> None:
        model = three()
        with pytest.raises(AdapterError, match="'c' is trained"):
            offload_adapter(model, ["a", "c"])
        assert not any(info.on_host for info in adapter_status(model).adapters.values())
        offload_adapter(model, "a")
        with pytest.raises(AdapterError, match="'a' is kept in host memory"):
            set_trained(model, ["a"])

    def test_dtypes_survive(self) -> None:
        model = mlp()
        add_adapter(model, config(), "a", dtype=torch.bfloat16, trained=False)
        offload_adapter(model, "a")
        set_adapter(model, [])
        set_adapter(model, "a")
        assert {p.dtype for p in adapter_parameters(model, "a")} == {torch.bfloat16}


class TestStatus:
    def test_what_it_says(self) -> None:
        model = three()
        set_adapter(model, ["a", "c"])
        set_trained(model, "a")
        status = adapter_status(model)
        assert status.irregularities == [] and not status.disabled and status.also_trained == 0
        assert str(status).splitlines() == [
            "a  active, trained; r=2 on 3 layers; 84 parameters; float32; cpu",
            "b  attached; r=2 on 1 layers; 24 parameters; float32; cpu",
            "c  active; r=3 on 3 layers; 146 parameters; float32; cpu",
        ]
        with use_rows(model, ["a", "b", "a", "__base__"]):
            assert [info.rows for info in adapter_status(model).adapters.values()] == [2, 1, 0]
        with disable_adapters(model):
            assert str(adapter_status(model)).endswith("(disabled)")
        assert str(adapter_status(mlp().requires_grad_(False))) == "no adapter"

    def test_what_is_irregular(self) -> None:
        model = three()
        set_adapter(model, "a")
        assert adapter_status(model).irregularities == ["c: trained, but not active: no gradient reaches it"]
        set_trained(model, "a")
        adapter_parameters(model, "a")[0].requires_grad_(False)
        adapter_parameters(model, "b")[0].requires_grad_(True)
        lora_layers(model)["2.1"].active = ("b",)
        model[0].base_layer.weight.requires_grad_(True)
        by_hand = LoRALinear(Linear4bit(quantize(torch.randn(4, 4))))
        adapter_status(model)
        model.append(by_hand)
        status = adapter_status(model)
        assert status.also_trained == 48
        assert status.irregularities == [
            "3 was not put in by add_adapter: switching does not reach it",
            "a: set to be trained, but 1 of its 6 parameters are frozen",
            "a: 2.1 has it inactive, unlike the model",
            "b: set to be frozen, but 1 of its 2 parameters are trained",
            "b: 2.1 has it active, unlike the model",
        ]
        model.pop(3)
        set_adapter(model, "a")
        set_trained(model, "a")
        assert adapter_status(model).irregularities == []
