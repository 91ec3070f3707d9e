"""An adapter read from its files alone: what it means, and what is refused."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from tolerances import assert_alike
from torch import nn

from lorakit.adapters import LoraConfig, add_adapter, lora_layers, save_adapter
from lorakit.adapters.peft.folder import read_adapter_folder
from lorakit.errors import AdapterError, CheckpointError, ShapeError
from lorakit.layers import VARIANTS

P = "base_model.model."


def write(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({P + key: value.contiguous() for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def pair(path, out=6, into=5, r=4):
    return {f"{path}.lora_A.weight": torch.randn(r, into), f"{path}.lora_B.weight": torch.randn(out, r)}


def small_model():
    torch.manual_seed(0)
    blocks = [nn.ModuleDict({"q_proj": nn.Linear(8, 6), "k_proj": nn.Linear(8, 4)}) for _ in range(11)]
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)})


@pytest.mark.parametrize("rslora", [False, True])
def test_it_gives_the_updates_of_the_model_it_was_saved_from(tmp_path, rslora):
    model = small_model()
    config = LoraConfig(
        r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3}, use_rslora=rslora, init_lora_weights=False
    )
    add_adapter(model, config)
    save_adapter(model, tmp_path / "a")
    folder = read_adapter_folder(tmp_path / "a")
    live = lora_layers(model)
    assert list(folder.layers) == [f"layers.{n}.{name}" for n in range(11) for name in ("k_proj", "q_proj")]
    for path, layer in folder.layers.items():
        assert (layer.kind, layer.rank) == ("linear", 2 if "q_proj" in path else 4)
        assert layer.scaling == live[path].scaling["default"]
        delta = live[path].delta_weight("default")
        assert_alike(layer.update().dense().float(), delta, terms=6)  # four ranks, the scaling


def test_folders_of_runs_and_of_named_adapters(tmp_path):
    write(tmp_path / "run" / "adapter", pair("q"))
    assert list(read_adapter_folder(tmp_path / "run").layers) == ["q"]
    write(tmp_path / "run" / "other", pair("q"))
    with pytest.raises(AdapterError, match=r"several adapters \(adapter, other\)"):
        read_adapter_folder(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="holds no adapter"):
        read_adapter_folder(tmp_path / "empty")
    with pytest.raises(AdapterError, match="not a folder"):
        read_adapter_folder(tmp_path / "absent")


def test_embeddings_and_convolutions(tmp_path):
    tensors = {"wte.lora_embedding_A": torch.randn(4, 11), "wte.lora_embedding_B": torch.randn(5, 4)}
    tensors |= {"conv.lora_A.weight": torch.randn(4, 6, 3, 3), "conv.lora_B.weight": torch.randn(8, 4, 1, 1)}
    tensors |= {"grouped.lora_A.weight": torch.randn(4, 6, 3), "grouped.lora_B.weight": torch.randn(8, 2, 1)}
    layers = read_adapter_folder(write(tmp_path, tensors)).layers
    tensors = {key: tensor.double() for key, tensor in tensors.items()}
    expected = 2 * tensors["wte.lora_embedding_B"] @ tensors["wte.lora_embedding_A"]
    assert layers["wte"].kind == "embedding"
    assert_alike(layers["wte"].update().dense(), expected, terms=6)
    expected = 2 * torch.einsum(
        "or,rikl->oikl", tensors["conv.lora_B.weight"][:, :, 0, 0], tensors["conv.lora_A.weight"]
    )
    assert layers["conv"].kind == "conv"
    assert_alike(layers["conv"].update().dense(), expected.flatten(1), terms=6)
    x = torch.randn(2, 6, 10, dtype=torch.float64)
    a, b = tensors["grouped.lora_A.weight"], tensors["grouped.lora_B.weight"]
    expected = 2 * nn.functional.conv1d(nn.functional.conv1d(x, a), b, groups=2)
    weight = layers["grouped"].update().dense().view(8, 6, 3)
    assert_alike(nn.functional.conv1d(x, weight), expected, terms=2 * (6 * 3 + 4))


def test_experts_are_several_updates_in_one_tensor(tmp_path):
    a, b = torch.randn(3 * 4, 5), torch.randn(7, 4 * 3)
    folder = write(tmp_path, {"mlp.experts.lora_A.weight": a, "mlp.experts.lora_B.weight": b}, target_parameters=["w"])
    layer = read_adapter_folder(folder).layers["mlp.experts"]
    assert (layer.kind, layer.experts, layer.rank) == ("experts", 3, 4)
    expected = 2 * torch.einsum("ore,eri->eoi", b.double().view(7, 4, 3), a.double().view(3, 4, 5))
    for number in range(3):
        assert_alike(layer.update(number).dense(), expected[number], terms=6)
    with pytest.raises(ShapeError, match="no number 3"):
        layer.update(3)


def test_magnitudes_biases_and_whole_modules_are_there(tmp_path):
    biased = pair("q") | {"q.lora_B.bias": torch.rand(6)}
    folder = read_adapter_folder(write(tmp_path / "biased", biased, lora_bias=True))
    assert folder.layers["q"].further["lora_bias"].equal(biased["q.lora_B.bias"])
    tensors = pair("q") | {"q.lora_magnitude_vector": torch.rand(6), "lm_head.weight": torch.randn(9, 5)}
    folder = read_adapter_folder(write(tmp_path / "dora", tensors, use_dora=True))
    assert list(folder.layers) == ["q"] and list(folder.extras) == ["lm_head.weight"]
    assert folder.layers["q"].variant is VARIANTS["dora"]
    assert folder.layers["q"].further["lora_magnitude_vector"].equal(tensors["q.lora_magnitude_vector"])
    assert folder.extras["lm_head.weight"].equal(tensors["lm_head.weight"])
    with pytest.raises(KeyError):
        folder.layers["k"]


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"q.lora_B.weight": None}, {}, r"model\.q: lora_B is missing"),
        ({"q.lora_A.weight": torch.zeros(3, 5)}, {}, r"lora_A has shape \(3, 5\), but the config says rank 4"),
        ({"q.lora_B.weight": torch.zeros(6, 3)}, {}, r"\(4, 5\) and lora_B \(6, 3\) do not multiply"),
        ({"q.lora_B.weight": torch.zeros(6, 4, dtype=torch.int8)}, {}, "q.lora_B.weight holds torch.int8"),
        ({"q.lora_C.weight": torch.zeros(6, 4)}, {}, "q.lora_C.weight is not a tensor of a LoRA adapter"),
        ({"q.lora_bogus": torch.zeros(6, 4)}, {}, "q.lora_bogus is not a tensor of a LoRA adapter"),
        ({}, {"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"q.lora_B.bias": torch.ones(6)}, {}, "no lora_bias, but the file holds a bias on lora_B"),
        ({"q.lora_magnitude_vector": torch.ones(6)}, {}, "no use_dora, but the file holds magnitudes"),
        (
            {"q.lora_magnitude_vector": torch.ones(5)},
            {"use_dora": True},
            r"magnitude_vector has shape \(5,\), expected \(6,\)",
        ),
        ({}, {"r": 0}, "r is 0, expected a whole number from 1"),
        ({}, {"r": 2.0}, "r is 2.0, expected a whole number"),
        ({}, {"lora_alpha": "x"}, "lora_alpha is 'x', expected a number"),
        ({}, {"rank_pattern": {"q": True}}, "rank_pattern.q is True"),
        ({}, {"alpha_pattern": [1]}, "alpha_pattern is .*expected an object"),
        ({}, {"peft_type": "IA3"}, "got 'IA3'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, config, message):
    tensors = {key: value for key, value in (pair("q") | change).items() if value is not None}
    folder = write(tmp_path, tensors, **config)
    with pytest.raises((CheckpointError, AdapterError), match=message):
        read_adapter_folder(folder)


def test_nan_is_named_when_its_layer_is_read(tmp_path):
    tensors = pair("q") | pair("k")
    tensors["q.lora_B.weight"][1, 2] = math.nan
    layers = read_adapter_folder(write(tmp_path, tensors)).layers
    assert layers["k"].rank == 4
    with pytest.raises(CheckpointError, match=r"model\.q\.lora_B.weight holds inf or nan"):
        layers["q"]


def test_broken_files(tmp_path):
    folder = write(tmp_path, pair("q"))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="adapter_model"):
        read_adapter_folder(folder)
    file.unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle"):
        read_adapter_folder(folder)
    save_file({"q.lora_C.weight": torch.zeros(4, 5)}, file)
    with pytest.raises(CheckpointError, match=r"q\.lora_C\.weight is not a tensor of a LoRA adapter"):
        read_adapter_folder(folder)
    save_file({}, file)
    with pytest.raises(CheckpointError, match="no LoRA matrix"):
        read_adapter_folder(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_adapter_folder(folder)
