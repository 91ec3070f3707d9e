"""Adapters of models whose vocabulary was resized: the tables in their files, both ways between PEFT and lorakit."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tolerances import SMALL_DECODER, assert_alike
from torch import Tensor, nn

from lorakit import LoraConfig, add_adapter, load_adapter, save_adapter
from lorakit.adapters import adapter_modules
from lorakit.adapters.attach.targeting import unwrapped
from lorakit.errors import CheckpointError
from lorakit.layers import SavedModule

transformers = importlib.import_module("transformers")
peft = importlib.import_module("peft")

IDS = torch.tensor([[5, 60, 61, 7, 62]])
PREFIX = "base_model.model."

# Kind of adapter -> its settings, and the tables in its file where head and embedding are not tied, and where they are.
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
KINDS: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "layers": ({}, {f"{_EMBEDDING}.weight", f"{_HEAD}.weight"}, {f"{_EMBEDDING}.weight"}),
    "embedding": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        {f"{_EMBEDDING}.base_layer.weight", f"{_HEAD}.weight"},
        {f"{_EMBEDDING}.base_layer.weight"},
    ),
    "both": (
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {f"{_EMBEDDING}.base_layer.weight", f"{_HEAD}.base_layer.weight"},
        {f"{_EMBEDDING}.base_layer.weight"},
    ),
    "all new rows": ({"trainable_token_indices": [60, 61, 62, 63]}, {f"{_HEAD}.weight"}, set()),
    "some new rows": (
        {"trainable_token_indices": [60, 61]},
        {f"{_EMBEDDING}.token_adapter.base_layer.weight", f"{_HEAD}.weight"},
        {f"{_EMBEDDING}.token_adapter.base_layer.weight"},
    ),
    "a copy": (
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": False},
        {f"{_HEAD}.weight"},
        {f"{_HEAD}.weight"},
    ),
    "two copies": ({"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": False}, set(), set()),
}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of 60 tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=60, tie_word_embeddings=request.param, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def resized(folder: Path, seed: int, rows: int = 64) -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    model.resize_token_embeddings(rows, mean_resizing=False)
    assert isinstance(model, nn.Module)
    return model


def settings(**values: Any) -> dict[str, Any]:
    return {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | values


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(input_ids=IDS).logits
    return result


def saved(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    return load_file(save_adapter(model, folder) / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_ours(kind: str, folder: Path, tmp_path: Path) -> None:
    values, untied, tied = KINDS[kind]
    model = resized(folder, seed=1)
    expected = tied if model.config.tie_word_embeddings else untied  # type: ignore[union-attr]
    add_adapter(model, LoraConfig(**settings(**values)))
    tensors = saved(model, tmp_path / "adapter")
    copies = {f"{path}.weight" for path, module in adapter_modules(model).items() if isinstance(module, SavedModule)}
    tables = {key.removeprefix(PREFIX) for key, tensor in tensors.items() if tensor.shape == (64, 32)}
    assert tables - copies == expected
    same = resized(folder, seed=1)
    load_adapter(same, tmp_path / "adapter")
    assert_alike(logits(same), logits(model), SMALL_DECODER)

    other, kept, table = resized(folder, seed=2), resized(folder, seed=2), "get_input_embeddings"
    before = {key: tensor.clone() for key, tensor in kept.state_dict().items()}
    if not expected:
        load_adapter(other, tmp_path / "adapter")
        assert_alike(logits(other), logits(model), SMALL_DECODER)
        return
    with pytest.warns(
        UserWarning, match=r"^rows 60, 61, 62, 63 of .*, which resize_token_embeddings drew at random, are"
    ):
        load_adapter(other, tmp_path / "adapter")
    assert_alike(logits(other), logits(model), SMALL_DECODER)
    rows = [unwrapped(getattr(each, table)()).weight for each in (other, kept)]
    assert torch.equal(rows[0][:60], rows[1][:60])
    load_adapter(kept, tmp_path / "adapter", check_base=False)
    assert all(torch.equal(tensor, before[key]) for key, tensor in kept.state_dict().items() if key in before)


def test_rows_that_another_adapter_counts_on_stay(folder: Path, tmp_path: Path) -> None:
    model, other = resized(folder, seed=1), resized(folder, seed=2)
    add_adapter(model, LoraConfig(**settings()))
    saved(model, tmp_path / "adapter")
    add_adapter(other, LoraConfig(**settings()), "first")
    before = logits(other)
    with pytest.raises(CheckpointError, match=r"in rows 60, 61, 62, 63, which .* other adapters of the model may"):
        load_adapter(other, tmp_path / "adapter", "second")
    assert torch.equal(logits(other), before)


@pytest.mark.parametrize("kind", KINDS)
def test_ours_in_peft(kind: str, folder: Path, tmp_path: Path) -> None:
    """PEFT takes the tables over, so that the other model becomes the one of the adapter."""
    model, other = resized(folder, seed=1), resized(folder, seed=2)
    add_adapter(model, LoraConfig(**settings(**KINDS[kind][0])))
    saved(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(other, tmp_path / "adapter").eval()
    assert_alike(logits(theirs), logits(model), SMALL_DECODER)


@pytest.mark.parametrize("tying", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_theirs(kind: str, tying: bool, folder: Path, tmp_path: Path) -> None:
    values = settings(**KINDS[kind][0]) | ({"ensure_weight_tying": True} if tying else {})
    if tying and kind in ("layers", "embedding", "both"):
        pytest.skip("low-rank updates are not tied")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, and of tables that are written
        theirs = peft.get_peft_model(resized(folder, 1), peft.LoraConfig(task_type="CAUSAL_LM", **values)).eval()
        theirs.save_pretrained(tmp_path / "theirs")
    for seed in (1, 2):
        model = resized(folder, seed)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            load_adapter(model, tmp_path / "theirs")
        if any(
            "lacks the new rows of lm_head.weight" in str(one.message) for one in said
        ):  # PEFT writes the other table
            assert kind == "embedding" and not model.config.tie_word_embeddings  # type: ignore[union-attr]
            model.get_output_embeddings().weight = theirs.get_output_embeddings().weight  # type: ignore[operator]
        assert_alike(logits(model), logits(theirs), SMALL_DECODER)


def test_a_model_without_the_rows(folder: Path, tmp_path: Path) -> None:
    model = resized(folder, seed=1)
    add_adapter(model, LoraConfig(**settings()))
    saved(model, tmp_path / "adapter")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"shape \(64, 32\), .* call model.resize_token_embeddings\(64\) first"):
        load_adapter(plain, tmp_path / "adapter")


def test_a_table_of_another_base(folder: Path, tmp_path: Path) -> None:
    model, other = resized(folder, seed=1), resized(folder, seed=1)
    add_adapter(model, LoraConfig(**settings()))
    saved(model, tmp_path / "adapter")
    other.get_input_embeddings().weight.data[3] += 1  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=r"in 1 of 64 rows: it is the table of another base model"):
        load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize("rows", [60, 48])
def test_no_table_where_there_is_no_new_row(rows: int, folder: Path, tmp_path: Path) -> None:
    model = resized(folder, 1, rows)
    add_adapter(model, LoraConfig(**settings()))
    assert all("q_proj" in key for key in saved(model, tmp_path / "adapter"))


def test_rounded_tables_are_the_same_tables(folder: Path, tmp_path: Path) -> None:
    model = resized(folder, seed=1)
    add_adapter(model, LoraConfig(**settings()))
    save_adapter(model, tmp_path / "adapter", dtype=torch.bfloat16)
    load_adapter(resized(folder, seed=1), tmp_path / "adapter")
    load_adapter(resized(folder, seed=1).bfloat16(), tmp_path / "adapter")
