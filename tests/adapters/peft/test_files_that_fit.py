"""Files whose tensors all find their places: other names in the settings, other forms of the names, a run's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made import small_config, small_decoder, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit import (
    LoraConfig,
    add_adapter,
    inspect_adapter,
    load_adapter,
    load_model,
    merge_adapter,
    remove_adapter,
    save_adapter,
    swap_adapter,
)
from lorakit.adapters import (
    combine_folders,
    export_adapter,
    merge_checkpoint,
    read_adapter_config,
    read_adapter_folder,
    resize_folder,
)
from lorakit.errors import AdapterError, CheckpointError, ConfigError

IDS = torch.tensor([[5, 17, 300, 2, 41]])
PREFIX = "base_model.model."


def adapted(**settings: Any) -> nn.Module:
    model = small_decoder()
    torch.manual_seed(0)
    add_adapter(
        model, LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | settings)
    )
    return model


def rewritten(folder: Path, rename: Callable[[str], str], **settings: Any) -> Path:
    """Give the file's tensors other names and change its settings."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file({rename(key): tensor for key, tensor in load_file(file).items()}, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return folder


def same(name: str) -> str:
    return name


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj", "qkv_proj", "gate_up_proj"]},
        {"modules_to_save": ["classifier", "score"]},
        {"exclude_modules": ["nothing"]},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"layers_to_transform": [0, 1, 17]},
        {"target_modules": r"model\.layers\.\d+\.self_attn\.[qv]_proj"},
        {"target_modules": [f"model.layers.{n}.self_attn.{name}" for n in (0, 1, 2) for name in ("q_proj", "v_proj")]},
        {"rank_pattern": {"qkv_proj": 4}, "alpha_pattern": {"layers.9": 1}},
    ],
)
def test_settings_that_name_what_this_model_lacks(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = rewritten(save_adapter(adapted(), tmp_path / "adapter"), same, **settings)
    model = small_decoder()
    report = load_adapter(model, folder)
    assert torch.equal(model(IDS), adapted()(IDS))
    named = {"target_modules", "modules_to_save", "target_parameters"} & settings.keys()
    missing = [name for key in named for name in settings[key] if isinstance(settings[key], list)]
    absent = [name for name in missing if name not in ("q_proj", "v_proj") and ".0." not in name and ".1." not in name]
    assert len(report.missed) == len(absent) and all(name in str(report) for name in absent)


def test_a_user_who_types_such_a_name_is_told(tmp_path: Path) -> None:
    for settings, word in (
        ({"target_modules": ["q_proj", "qkv_proj"]}, "no module matches 'qkv_proj'; did you mean"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["score"]}, "no module matches 'score' of modules_to_save"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 17]}, r"layers_to_transform names \[17\]"),
    ):
        with pytest.raises(AdapterError, match=word):
            add_adapter(small_decoder(), LoraConfig(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rename", "error", "words"),
    [
        (lambda key: key.replace("v_proj", "vv_proj"), CheckpointError, ["vv_proj.lora_A.weight belongs to no layer"]),
        (
            lambda key: key.replace("layers.1", "layers.2"),
            CheckpointError,
            ["layers.1.self_attn.q_proj.lora_A.weight is"],
        ),
    ],
)
def test_tensors_without_a_place_and_places_without_a_tensor(
    rename: Callable[[str], str], error: type[Exception], words: list[str], tmp_path: Path
) -> None:
    folder = rewritten(save_adapter(adapted(), tmp_path / "adapter"), rename)
    model = small_decoder()
    with pytest.raises(error) as caught:
        load_adapter(model, folder)
    assert all(word in str(caught.value) for word in words) and torch.equal(model(IDS), small_decoder()(IDS))


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["norm"], "bias": "all"}, {"use_dora": True}])
@pytest.mark.parametrize(
    "rename",
    [lambda key: key.removeprefix(PREFIX), lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod.")],
    ids=["no prefix", "compiled"],
)
def test_other_forms_of_the_names(rename: Callable[[str], str], settings: dict[str, Any], tmp_path: Path) -> None:
    reference = save_adapter(adapted(**settings), tmp_path / "reference")
    folder = rewritten(save_adapter(adapted(**settings), tmp_path / "adapter"), rename)
    model = small_decoder()
    load_adapter(model, folder)
    assert torch.equal(model(IDS), adapted(**settings)(IDS))
    found, expected = read_adapter_folder(folder), read_adapter_folder(reference)
    assert list(found.layers) == list(expected.layers) and set(found.extras) == set(expected.extras)
    for path, layer in found.layers.items():
        assert torch.equal(layer.lora_A, expected.layers[path].lora_A)


def test_one_tensor_in_two_forms_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(adapted(), tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    save_file(tensors | {key.removeprefix(PREFIX): tensors[key] + 1}, file)
    with pytest.raises(CheckpointError, match="twice"):
        load_adapter(small_decoder(), folder)
    with pytest.raises(CheckpointError, match="is the same tensor as"):
        read_adapter_folder(folder)


def test_a_checkpoint_is_no_adapter(tmp_path: Path) -> None:
    folder = save_adapter(adapted(), tmp_path / "adapter")
    save_file(
        {key: t.contiguous() for key, t in small_decoder().state_dict().items()}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not a tensor of a LoRA adapter"):
        read_adapter_folder(folder)


class TestNamesThatBeginWithLora:
    """A model may have modules of such names."""

    def model(self) -> nn.ModuleDict:
        torch.manual_seed(0)
        names = ("lin", "lora_head", "lora_proj", "lora_A")
        return nn.ModuleDict({name: nn.Linear(8, 8) for name in names} | {"lora_emb": nn.Embedding(6, 8)})

    def saved(self, folder: Path, **settings: Any) -> tuple[nn.ModuleDict, Path]:
        model = self.model()
        torch.manual_seed(1)
        add_adapter(model, LoraConfig(r=2, init_lora_weights=False, **settings))
        return model, save_adapter(model, folder)

    @pytest.mark.parametrize(
        ("settings", "layers", "extras"),
        [
            ({"target_modules": ["lin"], "modules_to_save": ["lora_head"]}, ["lin"],
             ["lora_head.bias", "lora_head.weight"]),
            ({"target_modules": ["lora_proj", "lora_A"]}, ["lora_A", "lora_proj"], []),
            ({"target_modules": ["lora_proj"], "bias": "all"}, ["lora_proj"],
             ["lin.bias", "lora_A.bias", "lora_head.bias", "lora_proj.base_layer.bias"]),
            ({"target_modules": ["lin"], "trainable_token_indices": {"lora_emb": [1, 3]}}, ["lin"],
             ["lora_emb.token_adapter.trainable_tokens_delta"]),
            ({"target_modules": ["lora_emb", "lin"], "modules_to_save": ["lora_head"]}, ["lin", "lora_emb"],
             ["lora_head.bias", "lora_head.weight"]),
        ],
    )  # fmt: skip
    def test_the_folder(self, settings: dict[str, Any], layers: list[str], extras: list[str], tmp_path: Path) -> None:
        _, folder = self.saved(tmp_path / "adapter", **settings)
        adapter = read_adapter_folder(folder)
        assert sorted(adapter.layers) == layers and sorted(adapter.extras) == extras
        again = self.model()
        load_adapter(again, folder)
        save_adapter(again, tmp_path / "again")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
        assert [layer.name for layer in inspect_adapter(folder).layers] == list(adapter.layers)

    def test_export_swap_and_merged_checkpoint(self, tmp_path: Path) -> None:
        model, folder = self.saved(tmp_path / "adapter", target_modules=["lora_proj", "lin"])
        export_adapter(folder, tmp_path / "vllm", "vllm")
        fresh = self.model()
        add_adapter(fresh, LoraConfig(r=2, target_modules=["lora_proj", "lin"]))
        swap_adapter(fresh, "default", folder)
        x = torch.randn(2, 8)
        assert torch.equal(fresh["lora_proj"](x), model["lora_proj"](x))
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "config.json").write_text("{}")
        tensors = {key: tensor.clone() for key, tensor in self.model().state_dict().items()}
        save_file(tensors, tmp_path / "base" / "model.safetensors")
        both, both_folder = self.saved(tmp_path / "both", target_modules=["lin"], modules_to_save=["lora_head"])
        both["lora_head"].copies["default"].weight.data += 1
        save_adapter(both, both_folder)
        merge_checkpoint(both_folder, tmp_path / "out", base=tmp_path / "base")
        merge_adapter(both)
        merged = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(merged[key], tensor) for key, tensor in both.state_dict().items())

    def test_an_unknown_matrix_is_still_named(self, tmp_path: Path) -> None:
        _, folder = self.saved(tmp_path / "adapter", target_modules=["lin"])
        file = folder / "adapter_model.safetensors"
        save_file(load_file(file) | {f"{PREFIX}lin.lora_C.weight": torch.zeros(2, 2)}, file)
        with pytest.raises(CheckpointError, match=r"lin\.lora_C\.weight is not a tensor of a LoRA adapter"):
            read_adapter_folder(folder)


class TestARunsFolder:
    """Every call that takes an adapter's folder takes that of a run, with the adapter in it."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        base = write_checkpoint(tmp_path / "base", small_decoder(), small_config())
        model = load_model(base)
        torch.manual_seed(0)
        add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        save_adapter(model, tmp_path / "run" / "adapter")
        (tmp_path / "run" / "recipe.yaml").write_text("{}")
        (tmp_path / "run" / "checkpoints").mkdir()
        return tmp_path / "run"

    def test_it(self, run: Path, tmp_path: Path) -> None:
        (run / ".adapter.abc.part").mkdir()
        (run / ".adapter.abc.part" / "adapter_config.json").write_text("{}")  # left by a killed process
        base = tmp_path / "base"
        model = load_model(base)
        report = load_adapter(model, run)
        assert report.source == run / "adapter"
        remove_adapter(model)
        add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"]))
        swap_adapter(model, "default", run)
        assert read_adapter_config(run).r == 2 and list(read_adapter_folder(run).layers)
        resize_folder(run, tmp_path / "small", rank=1)
        combine_folders({run: 1.0}, tmp_path / "sum")
        merge_checkpoint(run, tmp_path / "merged")
        export_adapter(run, tmp_path / "vllm", "vllm")
        assert inspect_adapter(run, base=base).layers


class TestWhatIsSaid:
    def test_a_report_says_what_was_loaded_and_that_it_is_frozen(self, tmp_path: Path) -> None:
        folder = save_adapter(adapted(), tmp_path / "adapter")
        report = load_adapter(small_decoder(), folder)
        assert str(report).splitlines()[0] == f"adapter 'default' loaded from {folder} on 4 layers"
        assert str(report).splitlines()[-1].startswith(f"adapter params: {report.trainable:,}, frozen || all params: ")
        report = load_adapter(small_decoder(), folder, trained=True)
        assert str(report).splitlines()[-1].startswith("trainable params: ")
        assert "loaded" not in str(add_adapter(small_decoder(), LoraConfig(r=2)))

    @pytest.mark.parametrize(
        ("key", "name"),
        [("rank", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout"), ("targets", "target_modules"),
         ("lora_rank", "r"), ("lora_target_modules", "target_modules"), ("use_rs_lora", "use_rslora")],
    )  # fmt: skip
    def test_settings_under_other_programs_names(self, key: str, name: str) -> None:
        with pytest.raises(ConfigError, match=f"{key}: unknown key; here it is called '{name}'"):
            LoraConfig(**{key: 8})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="inference_mode: unknown key; it is not needed here, leave it out"):
            LoraConfig(inference_mode=True)  # type: ignore[call-arg]
        with pytest.raises(ConfigError, match="lora_alpa: unknown key; did you mean 'lora_alpha'"):
            LoraConfig(lora_alpa=8)  # type: ignore[call-arg]

    def test_the_task_of_a_file_is_kept_and_that_of_a_plain_module_is_none(self, tmp_path: Path) -> None:
        def task(folder: Path) -> Any:
            return json.loads((folder / "adapter_config.json").read_text())["task_type"]

        folder = save_adapter(adapted(), tmp_path / "adapter")
        assert task(folder) == "CAUSAL_LM"
        for value in ("FEATURE_EXTRACTION", None):
            rewritten(folder, same, task_type=value)
            model = small_decoder()
            load_adapter(model, folder)
            assert task(save_adapter(model, tmp_path / "again")) == value
        own: nn.Module = nn.Sequential(nn.Linear(4, 4))
        add_adapter(own, LoraConfig(r=2))
        assert task(save_adapter(own, tmp_path / "own")) is None
        remove_adapter(own)
        add_adapter(own, LoraConfig(r=2, task_type="SEQ_CLS"))
        assert task(save_adapter(own, tmp_path / "own")) == "SEQ_CLS"
