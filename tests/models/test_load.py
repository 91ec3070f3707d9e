"""Loading: single and sharded checkpoints, quantized on the way, every fault named, never the whole model in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from made import ARCHITECTURES, small_config, small_decoder, write_checkpoint, write_weights
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit import Decoder, Linear4bit, load_model, load_tokenizer, quantize
from lorakit.errors import CheckpointError, ConfigError

IDS = torch.tensor([[5, 17, 300, 2, 41]])


def saved(folder: Path, shards: int = 1, **changes: Any) -> tuple[Decoder, Path]:
    model = small_decoder(**changes).bfloat16()
    return model, write_checkpoint(folder, model, small_config(**changes), shards)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def refused(folder: Path, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        load_model(folder)
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_was_saved_is_loaded(architecture: str, shards: int, tmp_path: Path) -> None:
    model, folder = saved(tmp_path, shards, **ARCHITECTURES[architecture])
    loaded = load_model(folder, quant_type=None)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded(IDS), model(IDS))
    assert loaded.folder == folder
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied is loaded.config.tie_word_embeddings


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_linear_layer_but_the_head_is_quantized(architecture: str, double_quant: bool, tmp_path: Path) -> None:
    model, folder = saved(tmp_path, **ARCHITECTURES[architecture])
    loaded = load_model(folder, block_size=32, double_quant=double_quant)
    for path, module in model.named_modules():
        ours = loaded.get_submodule(path)
        if isinstance(module, nn.Linear) and path != "lm_head":
            assert isinstance(ours, Linear4bit)
            expected = quantize(module.weight, block_size=32, double_quant=double_quant)
            assert torch.equal(ours.packed, expected.packed) and torch.equal(ours.quantized.absmax, expected.absmax)
            assert (ours.bias is None) == (module.bias is None)
            assert ours.bias is None or torch.equal(ours.bias, module.bias)
        elif hasattr(module, "weight"):
            assert torch.equal(ours.weight, module.weight)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert loaded(IDS).dtype == torch.bfloat16 and torch.isfinite(loaded(IDS)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_dtype_is_that_of_everything_not_quantized(dtype: torch.dtype, quant_type: str | None, tmp_path: Path) -> None:
    _, folder = saved(tmp_path, **ARCHITECTURES["llama-biases-tied"])
    loaded = load_model(folder, quant_type, dtype)
    assert loaded.dtype == loaded.lm_head.weight.dtype == loaded.model.layers[0].self_attn.q_proj.bias.dtype == dtype
    assert loaded(IDS).dtype == dtype


def test_the_loaded_model_does_not_hang_on_the_file(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    loaded = load_model(folder, quant_type=None)
    expected = loaded(IDS)
    (folder / "model.safetensors").write_bytes(b"")
    assert torch.equal(loaded(IDS), expected)
    for parameter in loaded.parameters():
        parameter.data.zero_()


def test_checkpoints_in_fp32_and_with_old_buffers(tmp_path: Path) -> None:
    model, folder = saved(tmp_path, tie_word_embeddings=True)
    tensors = {name: tensor.float() for name, tensor in weights(folder).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # transformers before 4.32
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(load_model(folder, quant_type=None)(IDS), model(IDS))


def test_load_tokenizer_reads_the_same_folder(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    assert load_tokenizer(folder).decode(load_tokenizer(folder).encode("The dog")) == "The dog"


class TestFaults:
    def test_missing_unexpected_and_mis_shaped_tensors_are_all_named(self, tmp_path: Path) -> None:
        _, folder = saved(tmp_path)
        tensors = weights(folder)
        tensors["model.layers.0.mlp.up_porj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
        tensors["model.norm.weight"] = torch.ones(31).bfloat16()
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors")
        message = refused(folder)
        assert str(folder) in message
        assert (
            "model.layers.0.mlp.up_proj.weight is missing; did you mean 'model.layers.0.mlp.up_porj.weight'? "
            "(expected shape (48, 32))" in message
        )
        assert "model.layers.0.mlp.up_porj.weight is not a tensor of LlamaForCausalLM" in message
        assert "model.norm.weight has shape (31,), expected (32,)" in message
        assert "lm_head.weight is missing; if the head is the embedding, config.json must say" in message

    def test_hundreds_of_problems_are_counted_not_listed(self, tmp_path: Path) -> None:
        changes = {"num_hidden_layers": 60}
        _, folder = saved(tmp_path, **changes)
        save_file({f"x.{name}": t for name, t in weights(folder).items()}, folder / "model.safetensors")
        message = refused(folder)
        assert message.count("\n") == 21
        assert message.endswith(f"(+{2 * (60 * 9 + 3) - 20} more)")

    @pytest.mark.parametrize("quant_type", ["nf4", None])
    def test_a_config_for_another_model(self, quant_type: str | None, tmp_path: Path) -> None:
        _, folder = saved(tmp_path)
        (folder / "config.json").write_text(json.dumps(small_config(architectures=["Qwen2ForCausalLM"])))
        with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.bias is missing"):
            load_model(folder, quant_type)

    def test_an_unknown_architecture(self, tmp_path: Path) -> None:
        _, folder = saved(tmp_path)
        (folder / "config.json").write_text(json.dumps(small_config(architectures=["Qwen2ForCasualLM"])))
        assert "did you mean 'Qwen2ForCausalLM'" in refused(folder, ConfigError)

    @pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
    def test_a_missing_file(self, file: str, tmp_path: Path) -> None:
        _, folder = saved(tmp_path)
        (folder / file).unlink()
        assert file in refused(folder)

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        _, folder = saved(tmp_path, shards=3)
        (folder / "model-00002-of-00003.safetensors").unlink()
        assert "model-00002-of-00003.safetensors" in refused(folder)

    @pytest.mark.parametrize("keep", [0, 5, 40, 0.5, -1])
    def test_a_truncated_file(self, keep: float, tmp_path: Path) -> None:
        _, folder = saved(tmp_path)
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
        assert "model.safetensors" in refused(folder)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_weight_that_cannot_be_quantized_is_named(self, value: float, tmp_path: Path) -> None:
        _, folder = saved(tmp_path)
        tensors = weights(folder)
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value
        save_file(tensors, folder / "model.safetensors")
        assert "model.layers.1.mlp.down_proj.weight: cannot quantize" in refused(folder)

    def test_a_weight_of_a_strange_dtype_is_named(self, tmp_path: Path) -> None:
        _, folder = saved(tmp_path)
        tensors = weights(folder)
        name = "model.layers.0.self_attn.k_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        write_weights(folder, tensors)
        assert f"{name}: cannot quantize" in refused(folder)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [({"quant_type": "nf5"}, "did you mean 'nf4'"), ({"block_size": 48}, "block_size 48 is not one of")],
    )
    def test_an_unknown_quantization(self, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
        _, folder = saved(tmp_path)
        with pytest.raises(ConfigError, match=message):
            load_model(folder, **arguments)

    @pytest.mark.parametrize("path", ["nowhere", "smollm2-135m-instrct", "config.json"])
    def test_no_folder(self, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        saved(tmp_path)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CheckpointError, match=path):
            load_model(path)


LOAD_AND_MEASURE = """
import sys, torch
from lorakit import load_model, quantize
from lorakit.measure import peak_rss_mb
quantize(torch.randn(1024, 1024))  # code takes memory too, once
torch.empty(2, device="meta").normal_()  # as an embedding does: torch imports 70 MB of modules for this
before = peak_rss_mb()
model = load_model(sys.argv[1])
kept = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values()) / 2**20
print(peak_rss_mb() - before, kept)
"""


def test_loading_never_holds_the_16_bit_model(tmp_path: Path) -> None:
    changes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5, "head_dim": 256}
    sizes = {name: tensor.shape for name, tensor in meta_decoder(changes).state_dict().items()}
    pool = torch.randn(max(size.numel() for size in sizes.values())).bfloat16()
    write_weights(tmp_path, {name: pool[: size.numel()].view(size).clone() for name, size in sizes.items()}, shards=2)
    (tmp_path / "config.json").write_text(json.dumps(small_config(**changes)))
    total = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) / 2**20
    command = [sys.executable, "-c", LOAD_AND_MEASURE, str(tmp_path)]
    # The bound is that of the CPU's kernels: their definition in plain PyTorch, which may be chosen, needs more.
    environment = {key: value for key, value in os.environ.items() if key != "LORAKIT_BACKEND"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    peak, kept = map(float, output.split())
    largest = 2 * 1024 * 4096 / 2**20
    assert total > 12 * largest
    assert peak < kept + 4 * largest  # two tensors read ahead, codes, and the allocator's slack


def meta_decoder(changes: dict[str, Any]) -> Decoder:
    from lorakit.models import DecoderConfig

    with torch.device("meta"):
        return Decoder(DecoderConfig.from_dict(small_config(**changes)))
