"""`lorakit quantize`: what is written loads to the same bits, and no interruption leaves half a folder."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from made import ARCHITECTURES, small_config, small_decoder, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorakit import Decoder, load_model, load_tokenizer
from lorakit.checkpoints.safetensors_header import read_header
from lorakit.cli.app import app
from lorakit.errors import CheckpointError, ConfigError, LorakitError, StorageError
from lorakit.models import Checkpoint
from lorakit.models.quantize_checkpoint import quantize_checkpoint
from lorakit.quantization.policy import QuantConfig


def source(folder: Path, shards: int = 1, **changes: Any) -> Path:
    return write_checkpoint(folder / "src", small_decoder(**changes), small_config(**changes), shards)


def assert_same_model(a: Decoder, b: Decoder) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_loads_as_if_quantized_on_loading(architecture: str, shards: int, tmp_path: Path) -> None:
    src = source(tmp_path, shards, **ARCHITECTURES[architecture])
    written = quantize_checkpoint(src, tmp_path / "dst", shard_bytes=10**9 if shards == 1 else 20_000)
    assert_same_model(load_model(written.folder), load_model(src))
    assert (written.quantized, written.quantized + written.kept) == (14, len(Checkpoint(src)))
    files = sorted((tmp_path / "dst").glob("*.safetensors"))
    assert (len(files) == 1) == (shards == 1)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(quant_type="fp4", block_size=32, double_quant=False),
        QuantConfig(storage_dtype="bfloat16"),
        QuantConfig(storage_dtype="float16"),
        QuantConfig(storage_dtype="float32", skip=()),
        QuantConfig(
            overrides={"down_proj": {"quant_type": "fp4"}, "q_proj": {"skip": True}, "k_proj": {"double_quant": False}}
        ),
    ],
    ids=["fp4-32-plain", "bfloat16", "float16", "float32-head", "overrides"],
)
def test_every_setting(config: QuantConfig, tmp_path: Path) -> None:
    src = source(tmp_path)
    dst = quantize_checkpoint(src, tmp_path / "dst", config).folder
    on_the_way = load_model(src, quant_config=config)
    keep_storage = QuantConfig(storage_dtype=config.storage_dtype)
    assert_same_model(load_model(dst, quant_config=keep_storage), on_the_way)
    packed = load_file(dst / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert packed.dtype == getattr(torch, config.storage_dtype)


def test_the_folder_is_complete(tmp_path: Path) -> None:
    src = source(tmp_path, torch_dtype="float16")
    extra = {"generation_config.json": "{}", "LICENSE": "terms", "merges.txt": "", "chat_template.jinja": "x"}
    left = {"lorakit-manifest.json": "{}", "model.gguf": "", "pytorch_model.bin": "", "modeling.py": ""}
    for name, text in (extra | left).items():
        (src / name).write_text(text)
    dst = quantize_checkpoint(src, tmp_path / "dst", shard_bytes=20_000).folder
    shards = sorted(dst.glob("*.safetensors"))
    surroundings = {file.name for file in dst.iterdir()} - {file.name for file in shards}
    kept = {file.name for file in src.iterdir()} - {"model.safetensors"} - left.keys()
    assert surroundings == kept | {"model.safetensors.index.json"}
    assert (dst / "LICENSE").read_text() == "terms"
    assert load_tokenizer(dst).encode("The dog") == load_tokenizer(src).encode("The dog")
    config = json.loads((dst / "config.json").read_text())
    section = config.pop("quantization_config")
    assert config == json.loads((src / "config.json").read_text())
    assert section["quant_method"] == "bitsandbytes" and section["load_in_4bit"] is True
    assert (section["bnb_4bit_quant_type"], section["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert (section["bnb_4bit_quant_storage"], section["bnb_4bit_compute_dtype"]) == ("uint8", "float16")
    assert section["llm_int8_skip_modules"] == ["lm_head"]
    index = json.loads((dst / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in shards}
    sizes = {file: [entry.end - entry.start for entry in read_header(file).values()] for file in shards}
    assert len(shards) == 4 and all(sum(parts) <= 20_000 or len(parts) == 1 for parts in sizes.values())


def test_safetensors_itself_reads_the_files(tmp_path: Path) -> None:
    """Odd sizes, so that tensors of an odd length stand between others: each must still start at its itemsize."""
    changes = {"hidden_size": 10, "intermediate_size": 27, "num_attention_heads": 1, "num_key_value_heads": 1}
    src = source(tmp_path, head_dim=6, **changes)
    dst = quantize_checkpoint(src, tmp_path / "dst").folder
    checkpoint = Checkpoint(dst)
    with safe_open(dst / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(checkpoint.names) and file.metadata() == {"format": "pt"}
        for name in checkpoint.names:
            assert torch.equal(file.get_tensor(name), checkpoint.read(name))
            assert checkpoint.entry(name).start % checkpoint.dtype(name).itemsize == 0
    assert_same_model(load_model(dst), load_model(src))


def test_a_tied_head_is_not_written_twice(tmp_path: Path) -> None:
    src = source(tmp_path, tie_word_embeddings=True)
    tensors = load_file(src / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    dst = quantize_checkpoint(src, tmp_path / "dst").folder
    assert not {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"} & set(Checkpoint(dst).names)
    assert_same_model(load_model(dst), load_model(src))


def test_misaligned_weights_are_reported(tmp_path: Path) -> None:
    written = quantize_checkpoint(source(tmp_path), tmp_path / "dst", QuantConfig(block_size=32))
    assert sorted(written.misaligned) == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]  # 48 columns


# interruptions

KILL = """
import os, sys
from pathlib import Path
from lorakit.models.quantize_checkpoint import quantize_checkpoint
def progress(done, total):
    if len(list(Path(sys.argv[2] + ".partial").glob("model-*"))) == 3:
        os.kill(os.getpid(), 9)
quantize_checkpoint(sys.argv[1], sys.argv[2], shard_bytes=20_000, progress=progress)
"""


def killed(src: Path, dst: Path) -> Path:
    """Run until three shards are written, and be killed while the fourth is."""
    assert subprocess.run([sys.executable, "-c", KILL, str(src), str(dst)]).returncode == -signal.SIGKILL
    assert not dst.exists()
    return dst.with_name(f"{dst.name}.partial")


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    src, dst = source(tmp_path), tmp_path / "dst"
    partial = killed(src, dst)
    finished = {file.name: file.stat() for file in partial.glob("model-*")}
    assert len(finished) == 3 and list(partial.glob(".*.part"))
    seen: list[tuple[int, int]] = []
    quantize_checkpoint(src, dst, shard_bytes=20_000, progress=lambda done, total: seen.append((done, total)))
    for name, stat in finished.items():
        assert ((dst / name).stat().st_ino, (dst / name).stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    total = sum(tensor.nbytes for tensor in load_file(src / "model.safetensors").values())
    assert 0 < seen[0][0] < total and seen[-1] == (total, total)
    quantize_checkpoint(src, tmp_path / "whole", shard_bytes=20_000)
    assert contents(dst) == contents(tmp_path / "whole")
    assert not partial.exists()


def test_a_run_with_other_settings_does_not_mix(tmp_path: Path) -> None:
    src, dst = source(tmp_path), tmp_path / "dst"
    partial = killed(src, dst)
    before = contents(partial).keys()
    with pytest.raises(StorageError, match="holds an unfinished run with another source or other settings"):
        quantize_checkpoint(src, dst, QuantConfig(block_size=32), shard_bytes=20_000)
    (src / "model.safetensors").touch()
    with pytest.raises(StorageError, match="another source"):
        quantize_checkpoint(src, dst, shard_bytes=20_000)
    assert {name for name in before if not name.endswith(".part")} == contents(partial).keys()


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    src, dst = source(tmp_path), tmp_path / "dst"
    refused = []

    def another(done: int, total: int) -> None:
        with pytest.raises(StorageError, match="is being written by another process"):
            quantize_checkpoint(src, dst)
        refused.append(done)

    quantize_checkpoint(src, dst, progress=another)
    assert refused
    assert_same_model(load_model(dst), load_model(src))


# what is refused


def refused(
    src: Path, dst: Path, error: type[LorakitError], config: QuantConfig | None = None, shard_bytes: int = 10**9
) -> str:
    with pytest.raises(error) as caught:
        quantize_checkpoint(src, dst, config, shard_bytes)
    return str(caught.value)


def test_a_value_that_is_not_finite_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    src = source(tmp_path)
    tensors = load_file(src / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    message = refused(src, tmp_path / "dst", CheckpointError)
    assert "model.safetensors: model.layers.1.mlp.up_proj.weight: cannot quantize a weight" in message
    assert [file.name for file in tmp_path.iterdir()] == ["src"]


def test_an_existing_target_is_left_alone(tmp_path: Path) -> None:
    src = source(tmp_path)
    (tmp_path / "dst").mkdir()
    assert "dst exists already" in refused(src, tmp_path / "dst", StorageError)
    assert "src exists already" in refused(src, src, StorageError)
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "precious.txt").touch()
    assert "other.partial is in the way" in refused(src, tmp_path / "other", StorageError)
    assert (tmp_path / "other.partial" / "precious.txt").exists()


def test_what_cannot_be_planned_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, dst = source(tmp_path), tmp_path / "dst"
    other = source(tmp_path / "odd", intermediate_size=27, hidden_size=10, head_dim=6)
    assert "did you mean 'down_proj'" in refused(src, dst, ConfigError, QuantConfig(skip=("donw_proj",)))
    assert "nothing would be quantized" in refused(src, dst, ConfigError, QuantConfig(quant_type=None))
    assert "[10, 27] do not divide into elements of float32" in refused(
        other, dst, ConfigError, QuantConfig(storage_dtype="float32")
    )
    tied = source(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head is tied" in refused(tied, dst, ConfigError, QuantConfig(skip=()))
    (src / "config.json").write_text(json.dumps(small_config(num_hidden_layers=3)))
    assert "model.layers.2.mlp.up_proj.weight is missing" in refused(src, dst, CheckpointError)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert "bytes are needed, 1,000 are free" in refused(tied, dst, StorageError)
    assert not list(tmp_path.glob("dst*"))


def test_a_4_bit_source_is_refused(tmp_path: Path) -> None:
    dst = quantize_checkpoint(source(tmp_path), tmp_path / "dst").folder
    assert "dst is in 4 bits already" in refused(dst, tmp_path / "again", ConfigError)


# the command


def test_the_command(tmp_path: Path) -> None:
    src, dst = source(tmp_path), tmp_path / "dst"
    options = ["--quant-type", "fp4", "--block-size", "32", "--no-double-quant", "--storage-dtype", "bfloat16"]
    options += ["--shard-size", "30KB", "--skip", "q_proj", "--skip", r"layers\.1\.mlp\..*"]
    result = CliRunner().invoke(app, ["quantize", str(src), str(dst), *options])
    assert result.exit_code == 0, result.output
    assert "9 weights in 4 bits" in result.output and "bitsandbytes 0.50.2" in result.output
    section = json.loads((dst / "config.json").read_text())["quantization_config"]
    assert (section["bnb_4bit_quant_type"], section["bnb_4bit_quant_storage"]) == ("fp4", "bfloat16")
    assert len(section["llm_int8_skip_modules"]) == 6 and "lm_head" in section["llm_int8_skip_modules"]
    expected = QuantConfig(
        quant_type="fp4", block_size=32, double_quant=False, skip=("lm_head", "q_proj", r"layers\.1\.mlp\..*")
    )
    assert_same_model(load_model(dst), load_model(src, quant_config=expected))
    assert len(list(dst.glob("*.safetensors"))) > 1
