"""PEFT's names: written and read back, and one set of defaults for a config that says little."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lorakit.adapters import load_adapter, read_adapter_folder
from lorakit.adapters.peft.names import matrix_names, path_and_table, tensor_name
from lorakit.layers import VARIANTS, Variant

TABLES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
@pytest.mark.parametrize("path", ["q", "model.layers.10.self_attn.q_proj", "experts.base_layer"])
def test_what_is_written_is_read_as_the_same_tensor(path: str, variant: Variant) -> None:
    for table in (*TABLES, *variant.trained):
        assert path_and_table(tensor_name(path, table, variant), variant) == (path, table)


def test_what_another_variant_trains_is_known() -> None:
    assert path_and_table("base_model.model.q.lora_B.bias", VARIANTS["dora"]) == ("q", "lora_bias")


def test_matrices_are_those_of_the_layer() -> None:
    assert matrix_names("q", is_embedding=False) == (
        "base_model.model.q.lora_A.weight",
        "base_model.model.q.lora_B.weight",
    )
    assert matrix_names("wte", is_embedding=True) == (
        tensor_name("wte", "lora_embedding_A"),
        tensor_name("wte", "lora_embedding_B"),
    )


@pytest.mark.parametrize(
    "name",
    [
        "q.lora_A.weight",
        "base_model.model.q.weight",
        "base_model.model.q.lora_C.weight",
        "base_model.model.q.my_lora_A.weight",
    ],
)
def test_other_names_have_no_table(name: str) -> None:
    assert path_and_table(name, VARIANTS["plain"]) is None


def test_magnitudes_of_older_files() -> None:
    name = "base_model.model.q.lora_magnitude_vector.weight"
    assert path_and_table(name, VARIANTS["dora"]) == ("q", "lora_magnitude_vector")


def test_a_config_without_numbers_means_the_same_to_every_reader(tmp_path):
    a, b = torch.randn(8, 5), torch.randn(6, 8)
    save_file(dict(zip(matrix_names("q", False), (a, b), strict=True)), tmp_path / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "target_modules": ["q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    model = nn.ModuleDict({"q": nn.Linear(5, 6)})
    load_adapter(model, tmp_path)
    layer = read_adapter_folder(tmp_path).layers["q"]
    assert (layer.rank, layer.scaling) == (8, 1.0)  # PEFT's r and lora_alpha
    assert (len(model["q"].lora_A["default"]), model["q"].scaling["default"]) == (8, 1.0)
