"""The adapter folder in PEFT's format: there and back, every fault named, nothing half-written or half-loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import ARCHITECTURES, small_decoder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit import (
    Decoder,
    LoraConfig,
    adapter_parameters,
    add_adapter,
    load_adapter,
    quantize,
    remove_adapter,
    save_adapter,
)
from lorakit.adapters import adapter_configs, lora_layers, read_adapter_config
from lorakit.errors import AdapterError, CheckpointError, LorakitError, StorageError
from lorakit.layers import Linear4bit

IDS = torch.tensor([[5, 17, 300, 2, 41]])
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def trained(model: nn.Module | None = None, **values: Any) -> nn.Module:
    """A model with an adapter that changes it."""
    torch.manual_seed(0)
    model = small_decoder() if model is None else model
    add_adapter(model, LoraConfig(**{"r": 3, "init_lora_weights": False, **values}))
    return model


def written(folder: Path, **values: Any) -> Path:
    return save_adapter(trained(**values), folder)


def edited(folder: Path, **changes: Any) -> None:
    """Change keys of adapter_config.json; None of them is removed by "absent"."""
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def refused(folder: Path, error: type[Exception] = CheckpointError, name: str = "default") -> str:
    """Load into a model that has an adapter already; nothing of it may change."""
    model = small_decoder()
    add_adapter(model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False), "old")
    modules, output = dict(model.named_modules()), model(IDS)
    trainable = {parameter_name for parameter_name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(error) as caught:
        load_adapter(model, folder, name)
    assert dict(model.named_modules()) == modules and torch.equal(model(IDS), output)
    assert trainable == {parameter_name for parameter_name, p in model.named_parameters() if p.requires_grad}
    assert list(adapter_configs(model)) == ["old"]
    return str(caught.value)


OPTIONS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 5),
        "lora_alpha": st.sampled_from([1, 8, 0.5, 1 / 3, 1e6]),
        "use_rslora": st.booleans(),
        "lora_dropout": st.sampled_from([0.0, 0.1]),
        "target_modules": st.sampled_from(
            [
                "all-linear",
                ["q_proj"],
                ["lm_head", "up_proj"],
                r".*\.(q|down)_proj",
                ["model.layers.1.mlp.up_proj", "q_proj"],
            ]
        ),
        "rank_pattern": st.dictionaries(
            st.sampled_from(["q_proj", r".*\.1\..*", "^model.*up_proj"]), st.integers(1, 7)
        ),
        "alpha_pattern": st.dictionaries(st.sampled_from(["q_proj", r"layers\.0\..*"]), st.sampled_from([4, 2.5])),
    },
    optional={
        "exclude_modules": st.sampled_from([["k_proj"], r".*\.0\.mlp\..*", []]),
        "layers_to_transform": st.sampled_from([[0, 1], []]),
    },
)


@given(options=OPTIONS, architecture=st.sampled_from(list(ARCHITECTURES)), quantized=st.booleans())
@settings(max_examples=25, deadline=None)
def test_what_was_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any], architecture: str, quantized: bool
) -> None:
    if "lm_head" in options["target_modules"]:
        options.pop("layers_to_transform", None)  # the head is in no layer, so that it would match nothing
    model, other = (small_decoder(**ARCHITECTURES[architecture]) for _ in range(2))
    if quantized:
        for each in (model, other):
            layer = each.model.layers[0].mlp
            layer.up_proj = Linear4bit(quantize(layer.up_proj.weight)).eval()
    torch.manual_seed(0)
    add_adapter(model, LoraConfig(init_lora_weights=False, **options), "here", is_strict=False)
    folder = save_adapter(model, tmp_path_factory.mktemp("adapter") / "adapter", "here")
    report = load_adapter(other, folder, "there")
    assert report.ranks == {path: len(layer.lora_A["here"]) for path, layer in lora_layers(model).items()}
    for ours, theirs in zip(adapter_parameters(model), adapter_parameters(other), strict=True):
        assert torch.equal(ours, theirs) and not theirs.requires_grad
    assert torch.equal(model(IDS), other(IDS))
    again = save_adapter(other, folder.with_name("again"), "there")
    assert [file.read_bytes() for file in sorted(again.iterdir())] == [f.read_bytes() for f in sorted(folder.iterdir())]


class TestSaving:
    def test_the_files_are_pefts(self, tmp_path: Path) -> None:
        folder = written(tmp_path / "adapter", lora_alpha=16, rank_pattern={"q_proj": 5})
        assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        config = json.loads((folder / "adapter_config.json").read_text())
        expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 16, "bias": "none"}
        assert expected.items() <= config.items() and config["rank_pattern"] == {"q_proj": 5}
        assert isinstance(config["lora_alpha"], int)
        assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
        tensors = load_file(folder / "adapter_model.safetensors")
        assert len(tensors) == 2 * 2 * 7
        assert tensors[Q0].shape == (5, 32) and tensors[Q0].dtype == torch.float32

    def test_all_linear_is_spelled_out_in_full_where_a_short_name_would_match_more(self, tmp_path: Path) -> None:
        inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        model = trained(nn.Sequential(inner, nn.Linear(4, 4)))
        folder = save_adapter(model, tmp_path / "adapter")
        targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
        assert targets == ["0.0", "1"]  # "0" is the name of a container, too, which PEFT cannot adapt

    def test_excluded_layers_stay_out(self, tmp_path: Path) -> None:
        for values in ({"layers_to_transform": [1]}, {"exclude_modules": r".*\.0\..*"}):
            folder = written(tmp_path / "adapter", **values)
            model = small_decoder()
            load_adapter(model, folder)
            assert {path.split(".")[2] for path in lora_layers(model)} == {"1"}

    def test_in_another_dtype(self, tmp_path: Path) -> None:
        model = trained()
        folder = save_adapter(model, tmp_path / "adapter", dtype=torch.bfloat16)
        assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {torch.bfloat16}
        other = small_decoder()
        load_adapter(other, folder)
        for ours, theirs in zip(adapter_parameters(model), adapter_parameters(other), strict=True):
            assert theirs.dtype == torch.float32 and torch.equal(ours.bfloat16().float(), theirs)
        assert next(iter(adapter_parameters(model))).dtype == torch.float32

    def test_one_of_several(self, tmp_path: Path) -> None:
        model = trained(target_modules=["q_proj"])
        add_adapter(model, LoraConfig(r=2, target_modules=["v_proj"]), "b")
        folder = save_adapter(model, tmp_path / "adapter", "default")
        assert all("q_proj" in name for name in load_file(folder / "adapter_model.safetensors"))

    def test_an_older_adapter_is_replaced(self, tmp_path: Path) -> None:
        folder = written(tmp_path / "adapter")
        written(folder, target_modules=["q_proj"], r=1)
        assert read_adapter_config(folder).r == 1
        assert len(load_file(folder / "adapter_model.safetensors")) == 4
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]

    def test_an_empty_folder_is_filled(self, tmp_path: Path) -> None:
        (tmp_path / "adapter").mkdir()
        written(tmp_path / "adapter")
        assert read_adapter_config(tmp_path / "adapter").r == 3

    def test_another_folder_is_not_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(AdapterError, match="exists and is not an adapter folder"):
            written(tmp_path)
        with pytest.raises(AdapterError, match="exists and is not an adapter folder"):
            written(tmp_path / "notes.txt")
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_unknown_names(self, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="no adapter 'defualt'; did you mean 'default'"):
            save_adapter(trained(), tmp_path / "adapter", "defualt")
        assert list(tmp_path.iterdir()) == []

    def test_a_file_in_the_way_of_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="cannot write"):
            written(tmp_path / "file" / "adapter")

    @pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
    def test_a_full_disk_leaves_the_old_adapter(self, tmp_path: Path) -> None:
        folder = written(tmp_path / "adapter", r=1)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        script = (
            "import resource, sys, torch\n"
            "from torch import nn\n"
            "from lorakit import LoraConfig, LorakitError, add_adapter, save_adapter\n"
            "model = nn.Sequential(nn.Linear(512, 512))\n"
            "add_adapter(model, LoraConfig(r=64))\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # EFBIG instead of ENOSPC\n"
            "try:\n"
            "    save_adapter(model, sys.argv[1])\n"
            "except LorakitError as error:\n"
            "    print(type(error).__name__, error)\n"
        )
        done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
        assert done.stdout.startswith(f"StorageError cannot write {folder}: "), done.stderr
        assert "left as it was" in done.stdout
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


class TestBrokenFolders:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return written(tmp_path / "adapter")

    def tensors(self, folder: Path, **changes: Tensor | None) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file) | changes
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)

    @pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
    def test_a_missing_file(self, folder: Path, file: str) -> None:
        (folder / file).unlink()
        assert file in refused(folder)

    def test_no_folder(self, tmp_path: Path) -> None:
        assert "nowhere" in refused(tmp_path / "nowhere")

    @pytest.mark.parametrize("text", ["", "{", "{'r': 8}", "\xff", '{"r": 8,}', "[" * 100_000])
    def test_broken_json(self, folder: Path, text: str) -> None:
        (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
        assert "adapter_config.json: not valid JSON" in refused(folder)

    @pytest.mark.parametrize("text", ["{}", '{"peft_type": "LOHA"}', '{"peft_type": null}'])
    def test_not_a_lora_adapter(self, folder: Path, text: str) -> None:
        (folder / "adapter_config.json").write_text(text)
        assert "peft_type 'LORA'" in refused(folder, AdapterError)

    @pytest.mark.parametrize("text", ["[]", "null", "3"])
    def test_no_object(self, folder: Path, text: str) -> None:
        (folder / "adapter_config.json").write_text(text)
        assert "expected an object" in refused(folder)

    @pytest.mark.parametrize(
        ("changes", "word"),
        [
            ({"r": "many"}, "r: "),
            ({"r": -1}, "r: "),
            ({"lora_alpha": "high"}, "lora_alpha"),
            ({"target_modules": 7}, "target_modules"),
            ({"target_modules": ["w_proj"]}, "no module matches 'w_proj'"),
            ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
            ({"bias": "some"}, "bias"),
            ({"trainable_token_indices": [4000]}, "expected different tokens below 400"),
            ({"use_dora": True, "lora_bias": True}, "exclude each other"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which changed the base model"),
            ({"init_lora_weights": "pissa_niter_16"}, "which changed the base model"),
            ({"init_lora_weights": "olora"}, "which changed the base model"),
            ({"init_lora_weights": "milora"}, "which changed the base model"),
            ({"init_lora_weights": "corda"}, "which changed the base model"),
            ({"rank_pattern": {"(": 2}}, "'\\(' is not a regular expression"),
        ],
    )
    def test_settings_we_cannot_follow(self, folder: Path, changes: dict[str, Any], word: str) -> None:
        edited(folder, **changes)
        message = refused(folder, AdapterError)
        assert word.replace("\\", "") in message

    @pytest.mark.parametrize(
        "changes",
        [
            {"use_dora": None, "modules_to_save": [], "exclude_modules": None, "layers_to_transform": None},
            {"init_lora_weights": "eva"},
            {"modules_to_save": ["classifier", "score"]},
            {"target_parameters": ["experts.up"]},
            {"inference_mode": False, "runtime_config": {}, "peft_version": "99.0", "auto_mapping": None},
            {"rank_pattern": "absent", "alpha_pattern": "absent", "lora_dropout": "absent", "use_rslora": "absent"},
        ],
    )
    def test_keys_that_change_nothing_are_passed_over(self, folder: Path, changes: dict[str, Any]) -> None:
        edited(folder, **changes)
        model = small_decoder()
        load_adapter(model, folder)
        assert torch.equal(model(IDS), trained()(IDS))

    def test_a_missing_tensor(self, folder: Path) -> None:
        self.tensors(folder, **{Q0: None})
        assert f"{Q0} is missing (expected shape (3, 32))" in refused(folder)

    def test_an_unexpected_tensor(self, folder: Path) -> None:
        extra = Q0.replace("layers.0", "layers.7")
        self.tensors(folder, **{extra: torch.zeros(3, 32)})
        assert f"{extra} belongs to no layer" in refused(folder)

    @pytest.mark.parametrize("shape", [(2, 32), (3, 31), (32, 3), (96,), (3, 32, 1), (0, 32)])
    def test_a_mis_shaped_tensor(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.tensors(folder, **{Q0: torch.zeros(shape)})
        assert f"{Q0} has shape {shape}, expected (3, 32)" in refused(folder)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_a_tensor_that_is_not_finite(self, folder: Path, value: float) -> None:
        tensor = torch.zeros(3, 32)
        tensor[1, 1] = value
        self.tensors(folder, **{Q0: tensor})
        assert f"{Q0} holds inf or nan" in refused(folder)

    def test_a_tensor_of_integers(self, folder: Path) -> None:
        self.tensors(folder, **{Q0: torch.zeros(3, 32, dtype=torch.int8)})
        assert f"{Q0} holds torch.int8" in refused(folder)

    def test_all_faults_are_named_at_once(self, folder: Path) -> None:
        b = Q0.replace("lora_A", "lora_B")
        self.tensors(folder, **{Q0: None, b: torch.zeros(1, 1), "stray": torch.zeros(1)})
        message = refused(folder)
        assert all(word in message for word in (f"{Q0} is missing", f"{b} has shape (1, 1)", "stray belongs"))

    def test_an_adapter_of_another_model(self, folder: Path) -> None:
        model = small_decoder(hidden_size=64)
        with pytest.raises(CheckpointError, match=r"has shape \(3, 32\), expected \(3, 64\)"):
            load_adapter(model, folder)
        assert not lora_layers(model)

    @pytest.mark.parametrize("keep", [0, 4, 60, 0.5, -1])
    def test_a_truncated_file(self, folder: Path, keep: float) -> None:
        file = folder / "adapter_model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
        assert "adapter_model.safetensors" in refused(folder)

    def test_a_pickle_is_not_opened(self, folder: Path) -> None:
        marker = folder / "executed"

        class Trap:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(marker),)

        torch.save({"x": Trap()}, folder / "adapter_model.safetensors")
        (folder / "adapter_model.bin").write_bytes((folder / "adapter_model.safetensors").read_bytes())
        refused(folder)
        assert not marker.exists()

    def test_a_name_that_is_taken_or_impossible(self, folder: Path) -> None:
        assert "already has an adapter 'old'" in refused(folder, AdapterError, "old")
        assert "cannot name an adapter" in refused(folder, AdapterError, "a.b")

    def test_every_error_is_lorakits(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        (folder / "adapter_model.safetensors").mkdir()
        refused(folder, LorakitError)


def test_loading_and_removing_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    folder, model = written(tmp_path / "adapter"), small_decoder()
    modules, output = dict(model.named_modules()), model(IDS)
    load_adapter(model, folder)
    assert not torch.allclose(model(IDS), output)
    remove_adapter(model)
    assert dict(model.named_modules()) == modules and torch.equal(model(IDS), output)
    assert isinstance(model, Decoder)
