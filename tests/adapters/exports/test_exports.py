"""Exports for vLLM, TGI and llama.cpp: read back by the consumers' own rules, restated here, they give our updates.

The rules come from the sources of vLLM (lora/peft_helper.py, lora_weights.py), TGI (adapters/lora.py) and llama.cpp
(src/llama-adapter.h, convert_lora_to_gguf.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made import ARCHITECTURES, small_config, small_decoder
from safetensors.torch import load_file, save_file
from tolerances import SMALL_DECODER, assert_alike, assert_within, rounding
from torch import Tensor, nn

from lorakit import LoraConfig, add_adapter, load_adapter, save_adapter
from lorakit.adapters import AdapterLayer, export_adapter, lora_layers, read_adapter_folder
from lorakit.errors import AdapterError, CheckpointError, LorakitError
from lorakit.models.gguf.gguf_file import open_gguf
from lorakit.models.gguf.gguf_rows import from_gguf_rows

CASES: dict[str, dict[str, Any]] = {
    "plain": {"lora_alpha": 3},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "ranks": {"lora_alpha": 3, "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 7}},
    "alphas": {"lora_alpha": 3, "alpha_pattern": {"k_proj": 1, r"0\.mlp\.up_proj": 11.5}},
    "ranks-alphas-rslora": {
        "lora_alpha": 5,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 1, "down_proj": 6},
        "alpha_pattern": {"down_proj": 2, "v_proj": 0.3},
    },
    "some-layers": {"lora_alpha": 2, "layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
    "one-module": {"lora_alpha": 2, "rank_pattern": {"v_proj": 9}, "target_modules": ["v_proj", "gate_proj"]},
}
TARGETS = ("vllm", "tgi", "llama.cpp")
LAYERS = [
    f"model.layers.{number}.{block}.{name}_proj"
    for number in range(2)
    for block, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
    for name in names
]
Rule = Callable[[Path], dict[str, tuple[Tensor, Tensor, float]]]


def adapted(architecture: str = "llama", dtype: torch.dtype = torch.float32, **values: Any) -> nn.Module:
    torch.manual_seed(0)
    model = small_decoder(**ARCHITECTURES[architecture])
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **values}
    add_adapter(model, LoraConfig(**config), dtype=dtype)
    return model


def saved(folder: Path, **values: Any) -> Path:
    """An adapter folder whose base is nowhere to be found."""
    path = save_adapter(adapted(**values), folder / "adapter")
    return edited(path)


def edited(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def in_vllm(folder: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """One scale from r, lora_alpha and use_rslora, for all layers: module path -> A, B, scale."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    root = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    paths = {re.fullmatch(r"base_model\.model\.(.*)\.lora_[AB]\.weight", key)[1] for key in tensors}  # type: ignore[index]
    found = {path: [tensors[f"base_model.model.{path}.lora_{m}.weight"] for m in "AB"] for path in paths}
    return {path: (a, b, config["lora_alpha"] / root) for path, (a, b) in found.items()}


def in_tgi(folder: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """The same scale; a projection is served where each layer has its adapter, all of one shape, and else nowhere."""
    read = in_vllm(folder)
    served = {}
    for layers in (LAYERS[number::7] for number in range(7)):
        if all(path in read for path in layers):
            torch.stack([read[path][0] for path in layers])
            served |= {path: read[path] for path in layers}
    return served


def in_llama_cpp(file: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """alpha / r of the tensor's own r; B in Hugging Face's order of rows again."""
    source = open_gguf(file)
    assert source.value("general.type", str) == "adapter"
    assert source.value("adapter.type", str) == "lora"
    alpha = source.value("adapter.lora.alpha", float)
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    names |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    read = {}
    for path in LAYERS:
        _, _, number, _, module = path.split(".")
        stem = f"blk.{number}.{names[module.removesuffix('_proj')]}.weight"
        if f"{stem}.lora_a" in source.tensors:
            a, b = source.read(f"{stem}.lora_a"), source.read(f"{stem}.lora_b")
            if source.value("general.architecture", str) == "llama" and module in ("q_proj", "k_proj"):
                b = from_gguf_rows(b, 4 if module == "q_proj" else 2)
            read[path] = (a, b, alpha / b.shape[1])
    assert len(source.tensors) == 2 * len(read)
    return read


RULES: dict[str, Rule] = {"vllm": in_vllm, "tgi": in_tgi, "llama.cpp": in_llama_cpp}


def assert_update(served: tuple[Tensor, Tensor, float] | None, ours: tuple[Tensor, Tensor, float] | None) -> None:
    """The same scaling * B @ A, up to a rounding to float32 of scaling * B and, in GGUF, of alpha."""
    if served is None or ours is None:
        assert ours is None
        assert served is None or not (served[1] @ served[0]).any()
        return
    (a, b, scale), (our_a, our_b, our_scale) = served, ours
    difference = scale * (b.double() @ a.double()) - our_scale * (our_b.double() @ our_a.double())
    magnitude = our_scale * (our_b.double().abs() @ our_a.double().abs())
    assert bool((difference.abs() <= 2.01 * 2.0**-24 * magnitude).all())


def ours_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    layers = lora_layers(model)
    return {p: (m.lora_A["default"].data, m.lora_B["default"].data, m.scaling["default"]) for p, m in layers.items()}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_consumers_apply_our_update(case: str, target: str, tmp_path: Path) -> None:
    model = adapted(**CASES[case])
    written = save_adapter(model, tmp_path / "out", target=target)
    assert written == tmp_path / "out"
    served, ours = RULES[target](written), ours_of(model)
    assert set(ours) <= set(LAYERS)
    for path in LAYERS:
        assert_update(served.get(path), ours.get(path))


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("plain", "rslora")])
def test_without_an_export_a_consumer_is_wrong(case: str, tmp_path: Path) -> None:
    """Or the rules above could not fail."""
    model = adapted(**CASES[case])
    written, ours = save_adapter(model, tmp_path / "out"), ours_of(model)
    with pytest.raises((AssertionError, RuntimeError)):
        served = in_tgi(written)
        for path in LAYERS:
            assert_update(served.get(path), ours.get(path))


@pytest.mark.parametrize("target", ["vllm", "tgi"])
def test_an_export_is_still_an_adapter(target: str, tmp_path: Path) -> None:
    for case, values in CASES.items():
        model = adapted(**values)
        again = small_decoder(**ARCHITECTURES["llama"])
        load_adapter(again, save_adapter(model, tmp_path / case, target=target))
        ids = torch.tensor([[5, 17, 300, 2, 41]])
        assert_alike(again(ids), model(ids), SMALL_DECODER)


@pytest.mark.parametrize("scale_exact", [True, False])
def test_16_bit_adapters_stay_so_where_nothing_is_rounded(scale_exact: bool, tmp_path: Path) -> None:
    model = adapted(dtype=torch.bfloat16, lora_alpha=8 if scale_exact else 3)
    for target in ("vllm", "tgi"):
        tensors = load_file(save_adapter(model, tmp_path / target, target=target) / "adapter_model.safetensors")
        assert {t.dtype for t in tensors.values()} == {torch.bfloat16 if scale_exact else torch.float32}
    ours, served = ours_of(model), in_llama_cpp(save_adapter(model, tmp_path / "a.gguf", target="llama.cpp"))
    for path in LAYERS:  # one alpha for all: nothing is folded
        assert torch.equal(served[path][0], ours[path][0].float())
        assert torch.equal(served[path][1], ours[path][1].float())
    chosen = save_adapter(model, tmp_path / "chosen", target="vllm", dtype=torch.float16)
    assert {t.dtype for t in load_file(chosen / "adapter_model.safetensors").values()} == {torch.float16}


def test_gguf_types(tmp_path: Path) -> None:
    model = adapted(lora_alpha=8)
    for dtype, name in ((torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")):
        source = open_gguf(save_adapter(model, tmp_path / name, target="llama.cpp", dtype=dtype))
        assert {tensor.tensor_type.name for tensor in source.tensors.values()} == {name}
        a, b = source.read("blk.1.attn_q.weight.lora_a"), source.read("blk.1.attn_q.weight.lora_b")
        layer = lora_layers(model)["model.layers.1.self_attn.q_proj"]
        assert torch.equal(a, layer.lora_A["default"].to(dtype).float())
        assert torch.equal(from_gguf_rows(b, 4), layer.lora_B["default"].to(dtype).float())


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3"])
def test_architectures_of_llama_cpp(architecture: str, tmp_path: Path) -> None:
    """llama and mistral permute q and k; the others do not."""
    model = adapted(architecture, lora_alpha=8)
    source = open_gguf(save_adapter(model, tmp_path / "a.gguf", target="llama.cpp"))
    assert source.value("general.architecture", str) == ("llama" if architecture == "mistral" else architecture)
    b, ours = source.read("blk.0.attn_q.weight.lora_b"), lora_layers(model)["model.layers.0.self_attn.q_proj"].lora_B
    assert torch.equal(from_gguf_rows(b, 4) if architecture == "mistral" else b, ours["default"])
    assert torch.equal(b, ours["default"]) == (architecture != "mistral")


def test_a_folder_needs_no_model(tmp_path: Path) -> None:
    adapter = saved(tmp_path, **CASES["ranks-alphas-rslora"])
    edited(adapter, base_model_name_or_path=None)
    model = adapted(**CASES["ranks-alphas-rslora"])
    for target in TARGETS:
        out = export_adapter(adapter, tmp_path / target, target, small_config(**ARCHITECTURES["llama"]))
        expected = save_adapter(model, tmp_path / f"{target}-2", target=target)
        files = [("adapter_model.safetensors" if target != "llama.cpp" else "")]
        assert all((out / file).read_bytes() == (expected / file).read_bytes() for file in files)


def test_the_base_is_looked_up_where_the_adapter_says(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(small_config()))
    adapter = edited(saved(tmp_path, lora_alpha=2), base_model_name_or_path=str(tmp_path / "base"))
    found = export_adapter(adapter, tmp_path / "found.gguf", "llama.cpp")
    given = export_adapter(adapter, tmp_path / "given.gguf", "llama.cpp", tmp_path / "base")
    assert found.read_bytes() == given.read_bytes()

    places = {None: "does not name its base model", "some/model": "some/model: there is no config.json"}
    for place, message in places.items():
        edited(adapter, base_model_name_or_path=place)
        for target in ("tgi", "llama.cpp"):
            with pytest.raises(CheckpointError, match=rf"{message}.*--base"):
                export_adapter(adapter, tmp_path / "out", target)
        assert not (tmp_path / "out").exists()
    export_adapter(adapter, tmp_path / "out", "vllm")  # needs no base

    for text, message in (
        ("[]", "holds a JSON list"),
        ("{", "not valid JSON"),
        ('{"architectures": ["LlamaForCausalLM"]}', ""),
    ):
        (tmp_path / "base" / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message or "num_hidden_layers None, expected a positive"):
            export_adapter(adapter, tmp_path / "other.gguf", "llama.cpp", tmp_path / "base")
    with pytest.raises(CheckpointError, match="num_hidden_layers None"):
        export_adapter(adapter, tmp_path / "other", "tgi", tmp_path / "base")


REFUSED: dict[str, Any] = {
    "use_dora": True,
    "modules_to_save": ["norm"],
    "trainable_token_indices": [1, 2],
    "bias": "all",
    "lora_bias": True,
    "target_parameters": ["experts"],
    "alora_invocation_tokens": [3],
    "layer_replication": [[0, 2]],
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("setting", REFUSED)
def test_what_is_more_than_matrices_is_refused(setting: str, target: str, tmp_path: Path) -> None:
    adapter = edited(saved(tmp_path, lora_alpha=2), **{setting: REFUSED[setting]})
    if setting == "use_dora":
        file = adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors |= {
            key.replace("lora_B.weight", "lora_magnitude_vector"): b.norm(dim=1)
            for key, b in tensors.items()
            if "lora_B" in key
        }
        save_file(tensors, file)
    with pytest.raises(AdapterError, match=rf"cannot serve this adapter.*\n  {setting}: .*\n.*merge"):
        export_adapter(adapter, tmp_path / "out", target, small_config())
    assert not (tmp_path / "out").exists()


def test_all_reasons_at_once_and_tensors_that_no_setting_explains(tmp_path: Path) -> None:
    adapter = edited(saved(tmp_path, lora_alpha=2), modules_to_save=["norm"], bias="lora_only")
    with pytest.raises(AdapterError, match=r"(?s)modules_to_save: .*bias: "):
        export_adapter(adapter, tmp_path / "out", "vllm")
    edited(adapter, modules_to_save=None, bias="none")
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.model.norm.weight": torch.ones(32)}, file)
    with pytest.raises(AdapterError, match=r"model\.norm\.weight: a tensor that is not of an adapter"):
        export_adapter(adapter, tmp_path / "out", "vllm")


def test_rank_limit(tmp_path: Path) -> None:
    model = adapted(rank_pattern={r"layers\.1\.mlp\.up_proj": 24})
    for target in ("peft", *TARGETS):
        with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj has rank 24, over the limit of 16.*rank 24"):
            save_adapter(model, tmp_path / "out", target=target, max_rank=16)
        save_adapter(model, tmp_path / target, target=target, max_rank=24)
    assert not (tmp_path / "out").exists()


def test_unknown_targets_and_names(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(
        AdapterError, match=r"unknown target 'vlm'; did you mean 'vllm'\? \(known: peft, vllm, tgi, lla"
    ):
        save_adapter(model, tmp_path / "out", target="vlm")
    with pytest.raises(AdapterError, match="no adapter 'x'"):
        save_adapter(model, tmp_path / "out", "x", "vllm")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_but_an_export_is_replaced(target: str, tmp_path: Path) -> None:
    model = adapted()
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "folder" / "file", tmp_path / "folder"):
        (tmp_path / "folder" / "file").write_text("mine")
        with pytest.raises(AdapterError, match="exists and is not"):
            save_adapter(model, place, target=target)
        assert (tmp_path / "folder" / "file").read_text() == "mine"
        assert len(list(tmp_path.rglob("*"))) == 2
    for _ in range(2):
        save_adapter(model, tmp_path / "out", target=target)


def test_modules_that_a_consumer_does_not_have(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"model": nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"router": nn.Linear(8, 8)})])})}
    )
    add_adapter(model, LoraConfig(r=2, target_modules=["router"]))
    adapter = save_adapter(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"layers\.0\.router: TGI adapts no such module"):
        export_adapter(adapter, tmp_path / "out", "tgi", small_config())
    with pytest.raises(AdapterError, match=r"layers\.0\.router: the GGUF model has no such tensor"):
        export_adapter(adapter, tmp_path / "out", "llama.cpp", small_config())
    with pytest.raises(AdapterError, match=r"'PhiForCausalLM' cannot be exported to llama.cpp \(known: Llama"):
        export_adapter(adapter, tmp_path / "out", "llama.cpp", small_config(architectures=["PhiForCausalLM"]))
    with pytest.raises(LorakitError, match="does not name its base model"):
        save_adapter(model, tmp_path / "out", target="llama.cpp")
    export_adapter(adapter, tmp_path / "vllm", "vllm")


def write_embedding_adapter(folder: Path, **tensors: Tensor) -> Path:
    """As PEFT writes it for an adapted embedding and head."""
    folder.mkdir()
    torch.manual_seed(1)
    made = {
        "model.embed_tokens.lora_embedding_A": torch.randn(4, 400),
        "model.embed_tokens.lora_embedding_B": torch.randn(32, 4),
    }
    made |= {"lm_head.lora_A.weight": torch.randn(2, 32), "lm_head.lora_B.weight": torch.randn(400, 2), **tensors}
    save_file({f"base_model.model.{key}": tensor for key, tensor in made.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "rank_pattern": {"lm_head": 2}}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["embed_tokens", "lm_head"]}))
    return folder


def of_rounding(layer: AdapterLayer) -> Tensor:
    """How far an export's update may be from the layer's: each is a sum over 4 ranks, of a scaled B rounded once."""
    update = layer.update()
    return 2 * rounding(4 + 3, update.up.abs() @ update.down.abs())


def test_embedding_and_head(tmp_path: Path) -> None:
    copy = {"model.embed_tokens.base_layer.weight": torch.ones(400, 32)}  # PEFT adds it by itself
    adapter = write_embedding_adapter(tmp_path / "adapter", **copy)
    ours = read_adapter_folder(adapter).layers
    exported = read_adapter_folder(export_adapter(adapter, tmp_path / "vllm", "vllm"))
    assert list(exported.extras) == []
    for path, layer in exported.layers.items():
        assert (layer.kind, layer.rank, layer.scaling) == (ours[path].kind, 4, 1.0)
        assert_within(layer.update().dense(), ours[path].update().dense(), of_rounding(ours[path]))

    source = open_gguf(export_adapter(adapter, tmp_path / "a.gguf", "llama.cpp", small_config()))
    for path, name in (("model.embed_tokens", "token_embd"), ("lm_head", "output")):
        a, b = source.read(f"{name}.weight.lora_a"), source.read(f"{name}.weight.lora_b")
        product = b @ a.T if name == "token_embd" else b @ a
        scale = source.value("adapter.lora.alpha", float) / b.shape[1]
        assert_within(scale * product.double(), ours[path].update().dense(), of_rounding(ours[path]))

    with pytest.raises(
        AdapterError, match=r"(?s)lm_head: embedding and head are one tensor.*embed_tokens: embedding and"
    ):
        export_adapter(adapter, tmp_path / "out", "llama.cpp", small_config(tie_word_embeddings=True))
    with pytest.raises(AdapterError, match=r"embed_tokens: TGI adapts no such module"):
        export_adapter(adapter, tmp_path / "out", "tgi", small_config())
