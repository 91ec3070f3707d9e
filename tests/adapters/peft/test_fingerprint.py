"""Whether a model is the one that an adapter was trained on: in every dtype and in 4 bits, not with other weights."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made import adapt, small_config, small_decoder, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit import (
    LoraConfig,
    add_adapter,
    inspect_adapter,
    load_adapter,
    load_model,
    merge_adapter,
    quantize,
    remove_adapter,
    save_adapter,
)
from lorakit.adapters import combine_folders, export_adapter, merge_checkpoint, read_adapter_folder, resize_folder
from lorakit.adapters.peft.fingerprint import base_fingerprint, sample_model
from lorakit.adapters.peft.samples import places, same_values, sample_4bit, sample_dense
from lorakit.errors import CheckpointError, LorakitError

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def base(seed: int = 0) -> nn.Module:
    return small_decoder(seed, **WIDE)


def in_bf16_by_way_of_fp16(model: nn.Module) -> nn.Module:
    return model.half().bfloat16()


def in_4bit(
    quant_type: str, block_size: int, double_quant: bool, dtype: torch.dtype
) -> Callable[[nn.Module], nn.Module]:
    def quantized(model: nn.Module) -> nn.Module:
        from lorakit.layers import Linear4bit

        model = model.to(dtype)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and "head" not in name:
                    weight = quantize(child.weight, quant_type, block_size, double_quant)
                    setattr(parent, name, Linear4bit(weight, child.bias))
        return model

    return quantized


SAME: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fp32": lambda model: model,
    "bf16": lambda model: model.bfloat16(),
    "fp16": lambda model: model.half(),
    "fp64": lambda model: model.double(),
    "fp16, bf16": in_bf16_by_way_of_fp16,
    "bf16, fp32": lambda model: model.bfloat16().float(),
    "fp16, fp32": lambda model: model.half().float(),
    "bf16, fp16": lambda model: model.bfloat16().half(),
    "nf4": in_4bit("nf4", 64, False, torch.float32),
    "nf4 of bf16, double": in_4bit("nf4", 64, True, torch.bfloat16),
    "nf4, large blocks": in_4bit("nf4", 256, True, torch.float16),
    "fp4": in_4bit("fp4", 64, True, torch.float32),
}


def fine_tuned(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith("o_proj.weight"):  # and nothing else
            parameter.data += 0.1 * parameter.std() * torch.randn(parameter.shape)
    return model


def merged(model: nn.Module) -> nn.Module:
    adapt(model, size=0.3, target_modules=["q_proj"])  # less is hidden in the steps from NF4 to FP4
    merge_adapter(model, reversible=False)
    return model


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "another seed": lambda: base(1),
    "fine-tuned": lambda: fine_tuned(base()),
    "an adapter merged": lambda: merged(base()),
}


def saved(folder: Path, model: nn.Module) -> Path:
    add_adapter(model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    return save_adapter(model, folder)


@pytest.mark.parametrize("there", SAME.values(), ids=SAME)
@pytest.mark.parametrize("here", SAME.values(), ids=SAME)
def test_the_same_model(here: Callable[[nn.Module], nn.Module], there: Callable[[nn.Module], nn.Module]) -> None:
    for seed in range(3):
        ours, theirs = sample_model(here(base(seed))), sample_model(there(base(seed)))
        assert ours.differing(theirs) == [] and theirs.differing(ours) == []


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("there", SAME.values(), ids=SAME)
@pytest.mark.parametrize("here", SAME.values(), ids=SAME)
def test_another_model(
    here: Callable[[nn.Module], nn.Module], there: Callable[[nn.Module], nn.Module], other: Callable[[], nn.Module]
) -> None:
    ours, theirs = sample_model(here(base())), sample_model(there(other()))
    assert not ours.is_of(theirs, ["model.layers.0.self_attn.v_proj"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_steps_of_training_are_seen(dtype: torch.dtype) -> None:
    """An update of a hundredth of the weights, less than their rounding to 4 bits but not less than that to bf16."""
    model, tuned = base().to(dtype), base()
    adapt(tuned, size=0.01)
    merge_adapter(tuned, reversible=False)
    assert len(sample_model(model).differing(sample_model(tuned.to(dtype)))) == 14


def test_what_loading_says(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", base())
    for name, there in SAME.items():
        model = there(base())
        load_adapter(model, folder)
        assert name and len(model.lora_state.configs) == 1  # type: ignore[union-attr]
    for other in OTHERS.values():
        model = other()
        with pytest.raises(
            CheckpointError,
            match=r"trained on another base model.*the weights .* differ; load it with",
        ):
            load_adapter(model, folder)
        load_adapter(model, folder, check_base=False)


def test_merging_exporting_inspecting_and_combining(tmp_path: Path) -> None:
    config = small_config(**WIDE)
    folders = {"base": write_checkpoint(tmp_path / "base", base(), config, shards=3)}
    folders |= {name: write_checkpoint(tmp_path / name, other(), config) for name, other in OTHERS.items()}
    adapter = saved(tmp_path / "adapter", load_model(folders["base"], quant_type="nf4"))
    merge_checkpoint(adapter, tmp_path / "out", base=folders["base"])
    inspect_adapter(adapter, base=folders["base"])
    inspect_adapter(adapter, base=base())
    resize_folder(adapter, tmp_path / "small", rank=1)
    export_adapter(adapter, tmp_path / "adapter.gguf", "llama.cpp", base=folders["base"])
    for name in OTHERS:
        for one in (adapter, tmp_path / "small"):
            with pytest.raises(CheckpointError, match="is not the base model of"):
                merge_checkpoint(one, tmp_path / "wrong", base=folders[name])
        with pytest.raises(CheckpointError, match="is not the base model of"):
            inspect_adapter(adapter, base=folders[name])
        with pytest.raises(CheckpointError, match="trained on another base model"):
            inspect_adapter(adapter, base=OTHERS[name]())
        with pytest.raises(CheckpointError, match="is not the base model of"):
            export_adapter(adapter, tmp_path / "wrong.gguf", "llama.cpp", base=folders[name])
        with pytest.raises(LorakitError, match="of different base models"):
            combine_folders({adapter: 1, saved(tmp_path / f"{name} adapter", OTHERS[name]()): 1}, tmp_path / "sum")
    assert not (tmp_path / "wrong").exists() and not (tmp_path / "wrong.gguf").exists()
    model = load_model(folders["base"], quant_type="nf4")
    load_adapter(model, adapter)
    for name in OTHERS:
        if name != "fine-tuned":  # a merge reads the weights of the adapted layers, and here these are the base's
            with pytest.raises(CheckpointError) if name == "another seed" else warnings.catch_warnings():
                merge_adapter(copy.deepcopy(model), base=folders[name])


def test_a_model_merged_in_place_is_another_unless_the_merge_can_be_undone(tmp_path: Path) -> None:
    from lorakit import unmerge_adapter

    folder = saved(tmp_path / "adapter", base())
    for make in (base, lambda: SAME["nf4"](base()), lambda: SAME["bf16"](base())):
        model = make()
        adapt(model, "first", target_modules=["q_proj"])
        merge_adapter(model, "first")
        load_adapter(model, folder)  # as it may while the other one is active
        save_adapter(model, tmp_path / "again")
        load_adapter(base(), tmp_path / "again")
        unmerge_adapter(model)
        remove_adapter(model)
        merge_adapter(model, "first", reversible=False)
        with pytest.raises(CheckpointError, match="another base model"):
            load_adapter(model, folder)


def test_adapters_and_copies_do_not_count(tmp_path: Path) -> None:
    model = base()
    before = sample_model(model)
    adapt(model, "one", modules_to_save=["lm_head"])
    model.lm_head.copies["one"].weight.data += 1
    after = sample_model(model)
    assert after.differing(before) == [] and after.weights.keys() == before.weights.keys()
    assert after.weights.keys() - sample_model(model, "one").weights.keys() == {"lm_head.weight"}


def with_head(seed: int) -> nn.ModuleDict:
    """A model whose head starts at random each time."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)) for _ in range(3)]
    body = nn.Sequential(*layers)
    torch.manual_seed(seed)
    return nn.ModuleDict({"body": body, "head": nn.Linear(16, 2)})


def test_a_head_that_starts_at_random(tmp_path: Path) -> None:
    model = with_head(1)
    add_adapter(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["head"]))
    save_adapter(model, tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(with_head(2), tmp_path / "saved")
    remove_adapter(model)
    add_adapter(model, LoraConfig(r=2, target_modules=["0"]))
    save_adapter(model, tmp_path / "without")
    with pytest.warns(UserWarning, match=r"in head\.bias, head\.weight of the base model.*modules_to_save"):
        load_adapter(with_head(2), tmp_path / "without")


class TestFiles:
    def rewritten(self, folder: Path, metadata: dict[str, str]) -> Path:
        file = folder / "adapter_model.safetensors"
        save_file(load_file(file), file, metadata=metadata)
        return folder

    def test_older_ones_have_a_hash_of_norms_and_biases(self, tmp_path: Path) -> None:
        folder = saved(tmp_path / "adapter", base())
        self.rewritten(folder, {"lorakit.base": base_fingerprint(base()) or ""})
        load_adapter(base(), folder)
        load_adapter(base().bfloat16(), folder)
        load_adapter(SAME["nf4"](base()), folder)
        with pytest.raises(CheckpointError, match="its norms and biases differ"):
            load_adapter(base(1), folder)

    def test_those_of_other_programs_say_nothing(self, tmp_path: Path) -> None:
        folder = self.rewritten(saved(tmp_path / "adapter", base()), {"format": "pt"})
        load_adapter(base(1), folder)
        assert read_adapter_folder(folder).base is None

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{}",
            '{"weights": {"a": ["", [3], "float32"]}, "values": "AAAA"}',
            '{"weights": {"a": ["", [3], "int9"]}, "values": ""}',
            '{"weights": {"a": ["", [3, -1], "float32"]}, "values": ""}',
            '{"weights": {"a": ["", ["x"], "float32"]}, "values": ""}',
            '{"weights": {"a": 1}, "values": ""}',
            '{"weights": 3, "values": ""}',
            '{"weights": {}, "values": "§"}',
        ],
    )
    def test_damaged_ones_are_refused(self, text: str, tmp_path: Path) -> None:
        folder = self.rewritten(saved(tmp_path / "adapter", base()), {"lorakit.base_weights": text})
        with pytest.raises(CheckpointError, match=r"lorakit\.base_weights cannot be read"):
            load_adapter(base(), folder)

    def test_the_same_bytes_each_time_and_few_of_them(self, tmp_path: Path) -> None:
        texts = []
        for name in ("a", "b"):
            with safe_open(saved(tmp_path / name, base()) / "adapter_model.safetensors", "pt") as file:
                texts.append(file.metadata()["lorakit.base_weights"])
        weights = json.loads(texts[0])["weights"]
        assert texts[0] == texts[1] and len(weights) == len(base().state_dict())
        assert len(texts[0]) < len(weights) * (64 * 4 * 4 / 3 + 100)


class TestSamples:
    def test_places(self) -> None:
        assert (
            places(0).tolist() == []
            and places(5).tolist() == [0, 1, 2, 3, 4]
            and places(64).tolist() == list(range(64))
        )
        for count in (65, 100, 4096, 10**9 + 7):
            found = places(count)
            assert len(found.unique()) == 64 if count > 70 else len(found) == 64
            assert found[0] == 0 and found.max() == count - 1

    def test_what_cannot_be_read(self) -> None:
        assert sample_dense(torch.empty(3, 4, device="meta")) is None
        assert sample_dense(torch.zeros(3, 4, dtype=torch.int8)) is None
        assert sample_dense(torch.zeros(3, 4).to(torch.float8_e4m3fn)) is None

    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_the_source_is_within_the_cells(self, quant_type: str, double_quant: bool) -> None:
        for seed in range(20):
            torch.manual_seed(seed)
            weight = torch.randn(128, 130) * torch.randn(128, 1).exp()
            sample, dense = sample_4bit(quantize(weight, quant_type, 64, double_quant)), sample_dense(weight)
            assert sample is not None and dense is not None and sample.bounds is not None
            low, high = sample.bounds
            assert ((low <= dense.values) & (dense.values <= high)).all()

    def test_rounding_twice(self) -> None:
        torch.manual_seed(0)
        for _ in range(200):
            weight = torch.randn(64) * 0.02
            assert same_values(weight.half().bfloat16(), weight.bfloat16())
            assert same_values(weight, weight.half().bfloat16())

    def test_values_that_fp16_flushes(self) -> None:
        weight = torch.randn(64) * 1e-8
        assert same_values(weight, weight.half()) and same_values(weight.bfloat16(), weight.half())
