"""`lorakit export`: an adapter of a small model, for each consumer, and errors of one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from made import small_decoder, write_checkpoint
from safetensors.torch import load_file
from typer.testing import CliRunner

from lorakit import LoraConfig, add_adapter, load_model, save_adapter
from lorakit.cli.app import app
from lorakit.errors import AdapterError, ConfigError, StorageError
from lorakit.models.gguf.gguf_file import open_gguf


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder that says where its base is."""
    torch.manual_seed(0)
    model = load_model(write_checkpoint(tmp_path / "base", small_decoder()), quant_type=None)
    add_adapter(model, LoraConfig(r=4, lora_alpha=6, alpha_pattern={"k_proj": 2}, init_lora_weights=False))
    return save_adapter(model, tmp_path / "adapter")


def test_each_target(adapter: Path, tmp_path: Path) -> None:
    for target in ("vllm", "tgi", "llama.cpp"):
        out = tmp_path / f"out-{target}"
        printed = lorakit("export", str(adapter), "--target", target, "--out", str(out))
        assert printed == f"{out}: the adapter, for {target}\n"
        if target == "llama.cpp":
            assert open_gguf(out).value("adapter.lora.alpha", float) == 6
        else:
            config = json.loads((out / "adapter_config.json").read_text())
            assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (4, 4, {})


def test_options(adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    base = ("--base", str(tmp_path / "base"))
    lorakit("export", str(adapter), "--target", "tgi", "--out", str(tmp_path / "out"), "--dtype", "float16", *base)
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.float16}
    for options, error in ((("--dtype", "int8"), ConfigError), (("--max-rank", "3"), AdapterError)):
        arguments = ["export", str(adapter), "--target", "vllm", "--out", str(tmp_path / "other"), *options]
        assert isinstance(CliRunner().invoke(app, arguments).exception, error)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("target", ["vllm", "tgi", "llama.cpp"])
def test_what_is_there_is_replaced_only_if_asked(target: str, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lorakit("export", str(adapter), "--target", target, "--out", str(out), "--dtype", "float16")
    before = {path: path.read_bytes() for path in (out, *out.rglob("*")) if path.is_file()}
    command = ("export", str(adapter), "--target", target, "--out", str(out))
    assert isinstance(CliRunner().invoke(app, command).exception, StorageError)
    assert {path: path.read_bytes() for path in (out, *out.rglob("*")) if path.is_file()} == before
    lorakit(*command, "--overwrite")
    assert {path: path.read_bytes() for path in (out, *out.rglob("*")) if path.is_file()} != before


def lorakit(*arguments: str) -> str:
    """Run a command that succeeds; return what it prints."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output
