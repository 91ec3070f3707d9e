"""GGUF import: against llama.cpp's own reordering and the gguf package's own names, and against malformed files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_gguf_files import HEAD_DIM, HEADS, HIDDEN, MERGES, VOCABULARY, permute, tiny_weights, write_gguf
from tokenizers import Tokenizer
from tolerances import assert_alike

from lorakit.errors import CheckpointError, LorakitError
from lorakit.models.gguf.gguf_import import import_gguf
from lorakit.models.gguf.gguf_rows import from_gguf_rows, to_gguf_rows
from lorakit.models.tokenizer.tokenizer import load_tokenizer

MakeGGUF = Callable[..., Path]


def only(folder: Path, *names: str) -> bool:
    """Whether a folder holds exactly these entries: no leftover of an attempt."""
    return {entry.name for entry in folder.iterdir()} == set(names)


# the order of q and k rows


@pytest.mark.parametrize("heads", [1, 2, 9])
def test_permutation_and_its_inverse(heads: int) -> None:
    weight = torch.randn(heads * 8, 5)
    permuted = torch.from_numpy(permute(weight.numpy(), heads))
    assert torch.equal(to_gguf_rows(weight, heads), permuted)
    assert torch.equal(from_gguf_rows(permuted, heads), weight)


def test_permutation_turns_neighboring_pairs_into_halves() -> None:
    """Rotating neighbors in GGUF's order is rotating halves in Hugging Face's: the reason the rows are reordered."""
    stored, x = torch.randn(HEADS * HEAD_DIM, HIDDEN).double(), torch.randn(HIDDEN).double()
    angles = torch.rand(HEAD_DIM // 2).double()
    in_gguf = torch.view_as_complex((stored @ x).reshape(HEADS, HEAD_DIM // 2, 2)) * torch.polar(
        torch.ones(()).double(), angles
    )

    q = (from_gguf_rows(stored, HEADS) @ x).reshape(HEADS, HEAD_DIM)
    first, second = q.chunk(2, dim=-1)
    rotated = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()

    for found, expected in zip((in_gguf.real, in_gguf.imag), rotated, strict=True):
        assert_alike(found, expected, terms=HIDDEN + 4)


# whole files


@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_to_the_bit(tiny_gguf: MakeGGUF, tmp_path: Path, tied: bool) -> None:
    weights = tiny_weights(tied)
    folder = import_gguf(tiny_gguf(weights), tmp_path / "out")
    read = load_file(folder / "model.safetensors")
    assert read.keys() == weights.keys()
    for name, tensor in weights.items():
        assert read[name].dtype == torch.bfloat16 and torch.equal(read[name], tensor), name
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1])
def test_quantized_weights_are_the_dequantized_ones(tiny_gguf: MakeGGUF, tmp_path: Path, kind: Any) -> None:
    weights = tiny_weights()
    path = tiny_gguf(weights, quantization=kind)
    read = load_file(import_gguf(path, tmp_path / "out") / "model.safetensors")
    stored = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == "blk.1.ffn_up.weight")
    expected = torch.from_numpy(dequantize(stored.data, stored.tensor_type)).bfloat16()
    assert torch.equal(read["model.layers.1.mlp.up_proj.weight"], expected)
    for name, tensor in weights.items():
        assert torch.allclose(read[name].float(), tensor.float(), atol=0.25), name


def test_the_config_says_what_the_metadata_say(tiny_gguf: MakeGGUF, tmp_path: Path) -> None:
    folder = import_gguf(tiny_gguf(metadata={"llama.rope.freq_base": 12345.5}), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-05 and config["rope_theta"] == 12345.5  # not the float32's 9.99999974e-06
    assert (config["hidden_size"], config["head_dim"], config["num_key_value_heads"]) == (32, 8, 2)
    assert config["vocab_size"] == len(VOCABULARY)
    assert "pad_token_id" not in config and config["eos_token_id"] == 2


def test_an_import_is_deterministic_and_says_where_it_comes_from(tiny_gguf: MakeGGUF, tmp_path: Path) -> None:
    path = tiny_gguf()
    first, second = import_gguf(path, tmp_path / "a"), import_gguf(path, tmp_path / "b")
    assert {f.name: f.read_bytes() for f in first.iterdir()} == {f.name: f.read_bytes() for f in second.iterdir()}
    readme = (first / "README.md").read_text()
    assert "license: apache-2.0" in readme and "tiny.gguf" in readme and str(tmp_path) not in readme


def test_the_real_model(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "rope_theta": 100000,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected
    assert "license: apache-2.0" in (smollm2 / "README.md").read_text()
    tokenizer = json.loads((smollm2 / "tokenizer.json").read_text())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    assert tokenizer["pre_tokenizer"] == {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
    }
    assert tokenizer["decoder"] == {**byte_level, "add_prefix_space": True}
    assert tokenizer["normalizer"] is None and tokenizer["post_processor"] is None
    assert [token["id"] for token in tokenizer["added_tokens"] if token["special"]] == list(range(17))


# tokenizers


def test_smollm_splits_digits_and_keeps_special_tokens_whole(tiny_gguf: MakeGGUF, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(import_gguf(tiny_gguf(), tmp_path / "out") / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>hello wo12<|im_end|>").tokens == [
        "<|im_start|>", "hello", "Ġwo", "1", "2", "<|im_end|>"
    ]  # fmt: skip


def test_gpt2_leaves_digits_to_the_merges(tiny_gguf: MakeGGUF, tmp_path: Path) -> None:
    path = tiny_gguf(metadata={"tokenizer.ggml.pre": "gpt-2"})
    tokenizer = Tokenizer.from_file(str(import_gguf(path, tmp_path / "out") / "tokenizer.json"))
    assert tokenizer.encode("wo12").tokens == ["w", "o", "12"]


def test_llama3_adds_bos_and_takes_whole_words(tiny_gguf: MakeGGUF, tmp_path: Path) -> None:
    vocabulary = [*VOCABULARY, "word"]  # a token that no merge leads to
    types = [3] * 3 + [1] * (len(vocabulary) - 3)
    weights = tiny_weights()
    weights["model.embed_tokens.weight"] = torch.zeros(len(vocabulary), HIDDEN)
    metadata = {
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": types,
    }
    tokenizer = load_tokenizer(import_gguf(tiny_gguf(weights, metadata=metadata), tmp_path / "out"))
    assert tokenizer.encode("word") == [len(vocabulary) - 1]
    assert tokenizer.encode("word", add_special_tokens=True) == [1, len(vocabulary) - 1]


@pytest.mark.parametrize("add_bos", [True, False])
def test_the_files_own_word_on_bos_counts(tiny_gguf: MakeGGUF, tmp_path: Path, add_bos: bool) -> None:
    path = tiny_gguf(metadata={"tokenizer.ggml.add_bos_token": add_bos})
    tokenizer = load_tokenizer(import_gguf(path, tmp_path / "out"))
    hello = VOCABULARY.index("hello")
    assert tokenizer.encode("hello", add_special_tokens=True) == ([1, hello] if add_bos else [hello])


# what is refused

NOT_FINITE = {**tiny_weights(), "model.norm.weight": torch.full((HIDDEN,), torch.inf)}
WRONG_SHAPE = {**tiny_weights(), "model.norm.weight": torch.zeros(HIDDEN + 1)}
MISSING = {name: tensor for name, tensor in tiny_weights().items() if name != "model.layers.1.mlp.up_proj.weight"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2' is not supported, only 'llama'"),
        ({"extra": {"rope_freqs.weight": np.ones(4, np.float32)}}, r"unknown tensor 'rope_freqs\.weight'"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(4, np.float32)}}, r"unknown .*did you mean 'blk\.0\.attn_q\.weight'"),
        ({"weights": MISSING}, r"tensor 'blk\.1\.ffn_up\.weight' is missing"),
        ({"weights": WRONG_SHAPE}, r"'output_norm\.weight' has shape \(33,\), the metadata say \(32,\)"),
        ({"weights": NOT_FINITE}, r"'output_norm\.weight' holds values that are not finite"),
        ({"metadata": {"llama.expert_count": 8}}, r"'llama\.expert_count' is set"),
        ({"metadata": {"llama.rope.scaling.type": "linear"}}, r"'llama\.rope\.scaling\.type' is set"),
        ({"metadata": {"llama.rope.dimension_count": 4}}, "head size 8 with 4 rotated"),
        ({"metadata": {"llama.attention.head_count_kv": 3}}, "4 heads, 3 key-value heads"),
        ({"metadata": {"llama.block_count": None}}, r"'llama\.block_count' is missing"),
        ({"metadata": {"llama.block_count": 0}}, "expected a positive size"),
        ({"metadata": {"llama.block_count": "two"}}, r"'llama\.block_count' is a str, expected int"),
        ({"metadata": {"tokenizer.ggml.model": "llama"}}, "tokenizer model 'llama' is not supported"),
        ({"metadata": {"tokenizer.ggml.pre": "smolm"}}, "unknown pre-tokenizer 'smolm'.*did you mean 'smollm'"),
        ({"metadata": {"tokenizer.ggml.merges": ["h zz"]}}, "merge 0, 'h zz', does not join two tokens"),
        ({"metadata": {"tokenizer.ggml.merges": [*MERGES, "hello"]}}, "merge 7, 'hello', does not join"),
        ({"metadata": {"tokenizer.ggml.token_type": [1, 1]}}, "and 2 token types"),
        ({"metadata": {"tokenizer.ggml.eos_token_id": None}}, r"'tokenizer\.ggml\.eos_token_id' is missing"),
        ({"metadata": {"tokenizer.ggml.eos_token_id": 9999}}, r"eos_token_id is 9999, the vocabulary has"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    tiny_gguf: MakeGGUF, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tiny_gguf(**changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        import_gguf(path, tmp_path / "out")
    assert str(path) in str(caught.value)
    assert only(tmp_path, "tiny.gguf")


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with pytest.raises(CheckpointError, match="no such file"):
        import_gguf(path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a folder, expected a GGUF file"):
        import_gguf(tmp_path, tmp_path / "out")
    for content in (b"", b"GG", b"PK\3\4 a zip"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.gguf: not a GGUF file: it starts with"):
            import_gguf(path, tmp_path / "out")
    assert only(tmp_path, "x.gguf")


def test_a_folder_with_something_in_it_is_left_alone(tiny_gguf: MakeGGUF, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    import_gguf(tiny_gguf(), tmp_path / "out")  # an empty one is fine
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="already exists and is not an empty folder"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_without_the_gguf_package_the_command_is_named(
    tiny_gguf: MakeGGUF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_gguf()
    monkeypatch.setitem(sys.modules, "gguf", None)  # what Python itself does for a module that cannot be imported
    with pytest.raises(LorakitError, match=r"pip install lorakit\[gguf\]"):
        import_gguf(path, tmp_path / "out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf", tiny_weights()).read_bytes()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
@example(share=0.999999)
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, whole: bytes, share: float) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"cut\.gguf"):
        import_gguf(path, tmp_path / "out")
    assert only(tmp_path, "cut.gguf")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_corruption_is_an_error_or_an_import(
    tmp_path: Path, whole: bytes, changes: list[tuple[float, int]]
) -> None:
    """Bytes of the metadata change: a CheckpointError and nothing on disk, or a folder that loads."""
    head = len(whole) - sum(tensor.numel() * 4 for tensor in tiny_weights().values())
    raw = bytearray(whole)
    for share, value in changes:
        raw[int(share * head)] = value
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    folder = tmp_path / "out"
    try:
        import_gguf(path, folder)
    except CheckpointError:
        assert only(tmp_path, "bad.gguf")
        return
    assert load_file(folder / "model.safetensors")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
