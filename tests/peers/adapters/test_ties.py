"""Models of transformers whose modules share weights: adapters on them, files in PEFT, merged models read again."""

from __future__ import annotations

import copy
import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model
from tolerances import assert_alike
from torch import Tensor, nn

from lorakit import (
    LoraConfig,
    adapter_parameters,
    add_adapter,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    unmerge_adapter,
)
from lorakit.adapters import adapter_modules
from lorakit.errors import AdapterError
from lorakit.layers import TiedModule

transformers = importlib.import_module("transformers")
peft = importlib.import_module("peft")

# Roundings: two layers of an encoder and two of a decoder, each at most 256 (`tolerances.SMALL_DECODER`), and a head.
TERMS = 4 * 256 + 64
_VOCABULARY = 60
_PAIR = {
    "vocab_size": _VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
_T5 = {"vocab_size": _VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
_BERT = {
    "vocab_size": _VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 48,
}  # fmt: skip
_ENDS = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

# Class of the model -> its sizes, a layer of its attention, its input embedding and its output head.
FAMILIES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "T5ForConditionalGeneration": (_T5, "q", "shared", "lm_head"),
    "UMT5ForConditionalGeneration": (_T5, "q", "shared", "lm_head"),
    "BartForConditionalGeneration": (_PAIR, "q_proj", "model.shared", "lm_head"),
    "MBartForConditionalGeneration": (_PAIR, "q_proj", "model.shared", "lm_head"),
    "PegasusForConditionalGeneration": (_PAIR, "q_proj", "model.shared", "lm_head"),
    "MarianMTModel": (_PAIR | _ENDS, "q_proj", "model.encoder.embed_tokens", "lm_head"),
    "WhisperForConditionalGeneration": (
        _PAIR | _ENDS | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20},
        "q_proj", "model.decoder.embed_tokens", "proj_out",
    ),
    "BertForMaskedLM": (_BERT, "query", "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    "AlbertForMaskedLM": (_BERT | {"embedding_size": 16}, "query", "albert.embeddings.word_embeddings",
                          "predictions.decoder"),
    "ElectraForMaskedLM": (_BERT | {"embedding_size": 16}, "query", "electra.embeddings.word_embeddings",
                           "generator_lm_head"),
    "GPT2LMHeadModel": ({"vocab_size": _VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 4}, "c_attn",
                        "transformer.wte", "lm_head"),
    "Qwen3ForCausalLM": (_BERT | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}, "q_proj",
                         "model.embed_tokens", "lm_head"),
}  # fmt: skip
PAIRS = [name for name in FAMILIES if "Generation" in name or "MT" in name]


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, family)
    model = kind(kind.config_class(**FAMILIES[family][0])).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position" not in name:  # some are computed and not saved
                parameter.add_(torch.randn_like(parameter) / (10 if parameter.ndim == 1 else 5))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    batch: dict[str, Tensor] = {}
    if "Whisper" in type(model).__name__:
        batch["input_features"] = torch.randn(2, 8, 40, generator=draw)
    else:
        batch["input_ids"] = torch.randint(3, _VOCABULARY, (2, 7), generator=draw)
        batch["input_ids"][0, :2] = torch.tensor([3, 4])
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        batch["decoder_input_ids"] = torch.tensor([[5, 3, 9, 4], [4, 17, 20, 3]])
    result: Tensor = model(**batch).logits
    return result


def with_adapter(family: str, **values: Any) -> nn.Module:
    model, layer = build(family), FAMILIES[family][1]
    values = {"r": 2, "target_modules": [layer], "init_lora_weights": False} | values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of copies that are not tied
        add_adapter(model, LoraConfig(**values))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(torch.randn_like(parameter) / 5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_rows_are_those_of_every_table(family: str) -> None:
    model = with_adapter(family, trainable_token_indices=[3, 4])
    plain, main = with_adapter(family), FAMILIES[family][2]
    rows = next(parameter for name, parameter in model.named_parameters() if "trainable_tokens" in name)
    table = plain.get_submodule(main).weight.data
    table[[3, 4]] = rows.detach()
    with torch.no_grad():
        for mine, other in zip(_low_rank(plain), _low_rank(model), strict=True):
            mine.copy_(other)
    assert_alike(logits(model), logits(plain), TERMS)


def _low_rank(model: nn.Module) -> list[Tensor]:
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


class TestPeft:
    """PEFT ties what `tie_word_embeddings` ties to the input embedding; its file names rows once and a copy often."""

    @pytest.mark.parametrize("family", [name for name in FAMILIES if "Masked" not in name and "Whisper" not in name])
    @pytest.mark.parametrize("kind", ["rows", "copy"])
    def test_files_go_both_ways(self, family: str, kind: str, tmp_path: Path) -> None:
        values: dict[str, Any] = {"trainable_token_indices": [3, 4]}
        if kind == "copy":
            values = {"modules_to_save": [FAMILIES[family][2]], "ensure_weight_tying": True}
        if kind == "copy" and family == "MarianMTModel":
            pytest.skip("PEFT 0.21.2 ties an embedding to one that is called embed_tokens by a linear layer, and fails")
        model = with_adapter(family, **values)
        save_adapter(model, tmp_path / "ours")
        theirs = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours").eval()
        assert_alike(logits(theirs), logits(model), TERMS)
        theirs.save_pretrained(tmp_path / "theirs")
        again = build(family)
        load_adapter(again, tmp_path / "theirs")
        assert_alike(logits(again), logits(model), TERMS)
        ours, written = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
        if kind == "rows" or "embed_tokens" in FAMILIES[family][2]:  # PEFT ties no copy of a table of another name
            assert ours.keys() == written.keys()

    @pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
    @pytest.mark.parametrize("family", ["Qwen3ForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
    def test_a_copy_that_peft_ties(self, name: str, family: str, tmp_path: Path) -> None:
        settings = peft.LoraConfig(
            r=2, target_modules=[FAMILIES[family][1]], modules_to_save=[name], ensure_weight_tying=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(build(family), settings)
        torch.manual_seed(1)
        for key, parameter in theirs.named_parameters():
            if parameter.requires_grad and "modules_to_save" in key:
                parameter.data += torch.randn_like(parameter) / 5
        theirs.save_pretrained(tmp_path)
        model, plain = build(family), build(family)
        load_adapter(model, tmp_path)
        plain.get_submodule(FAMILIES[family][2]).weight.data.copy_(
            load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.{FAMILIES[family][2]}.weight"]
        )
        assert_alike(logits(model), logits(plain), TERMS)
        assert sum(isinstance(module, TiedModule) for module in adapter_modules(model).values()) == (
            3 if family in PAIRS else 1
        )
        save_adapter(model, tmp_path / "ours")
        ours, written = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "ours", tmp_path))
        assert ours.keys() == written.keys() and all(torch.equal(ours[key], written[key]) for key in ours)

    def test_running_statistics(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        base = nn.Sequential()
        base.add_module("proj", nn.Linear(8, 8))
        base.add_module("head", nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2)))
        ours, theirs = copy.deepcopy(base).train(), copy.deepcopy(base)
        add_adapter(ours, LoraConfig(r=2, target_modules=["proj"], modules_to_save=["head"]))
        for _ in range(5):
            ours(3 * torch.randn(16, 8) + 5)
        save_adapter(ours, tmp_path / "ours")
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
        x = torch.randn(4, 8) + 5
        assert_alike(theirs(x), ours.eval()(x), 32)
        theirs.save_pretrained(tmp_path / "theirs")
        again = copy.deepcopy(base).eval()
        load_adapter(again, tmp_path / "theirs")
        assert torch.equal(again(x), ours(x))


def _changes(family: str) -> dict[str, dict[str, Any]]:
    _, layer, main, head = FAMILIES[family]
    changes: dict[str, dict[str, Any]] = {
        "rows": {"trainable_token_indices": [3, 4]},
        "low rank on the head": {"target_modules": [layer, head]},
        "low rank on the table": {"target_modules": [layer, main]},
        "a copy of the head": {"modules_to_save": [head], "ensure_weight_tying": False},
        "a copy for all": {"modules_to_save": [main], "ensure_weight_tying": True},
    }
    if family in PAIRS and "Bart" not in family:  # BART's is scaled by a number
        changes["low rank on the encoder's table"] = {"target_modules": [layer, "encoder.embed_tokens"]}
    if "Whisper" in family:
        del changes["low rank on the encoder's table"]
    if container := {"BertForMaskedLM": "cls", "AlbertForMaskedLM": "predictions"}.get(family):
        changes["a copy of all that makes the logits"] = {"modules_to_save": [container], "ensure_weight_tying": False}
    return changes


CHANGES = [(family, change) for family in FAMILIES for change in _changes(family)]


@pytest.mark.parametrize(("family", "change"), CHANGES, ids=[f"{family}-{change}" for family, change in CHANGES])
def test_a_merged_model_is_the_same_when_it_is_read_again(family: str, change: str, tmp_path: Path) -> None:
    model = with_adapter(family, **_changes(family)[change])
    tied, expected = model.config.tie_word_embeddings, logits(model)  # type: ignore[union-attr]
    merge_adapter(model)
    merged = logits(model)
    assert_alike(merged, expected, TERMS)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), merged)  # type: ignore[attr-defined]
    save_model(model, str(tmp_path / "all.safetensors"))
    unmerge_adapter(model)
    assert torch.equal(logits(model), expected) and model.config.tie_word_embeddings is tied  # type: ignore[union-attr]
    remove_adapter(model)
    fresh = build(family)
    assert _shared(model) == _shared(fresh) and torch.equal(logits(model), logits(fresh))


def _shared(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(shared for shared in names.values() if len(shared) > 1)


@pytest.mark.parametrize(
    "values",
    [
        {"trainable_token_indices": [3, 4]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": False},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": False},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    ],
    ids=lambda values: next(iter(values)),
)
def test_transformers_trainer_saves_and_resumes(values: dict[str, Any], tmp_path: Path) -> None:
    def trainer(steps: int, model: nn.Module) -> Any:
        torch.manual_seed(0)
        data = [{"input_ids": torch.randint(3, 60, (8,)), "labels": torch.randint(3, 60, (8,))} for _ in range(16)]
        settings = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, max_steps=steps, save_steps=2, learning_rate=0.1,
            report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        return transformers.Trainer(model, settings, train_dataset=data)

    model, again = (with_adapter("Qwen3ForCausalLM", **values) for _ in "ab")
    trainer(4, model).train()
    trainer(4, again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(adapter_parameters(again), adapter_parameters(model), strict=True))
    model.save_pretrained(tmp_path / "pretrained")
    save_model(model, str(tmp_path / "model.safetensors"))


def test_a_head_that_is_a_container_is_warned_about_or_tied() -> None:
    model = build("BertForMaskedLM")
    with pytest.warns(
        UserWarning, match="cls of modules_to_save shares its weight with bert.embeddings.word_embeddings"
    ):
        add_adapter(model, LoraConfig(r=2, target_modules=["query"], modules_to_save=["cls"]))
    assert not any(isinstance(module, TiedModule) for module in adapter_modules(model).values())
    tied = with_adapter("BertForMaskedLM", modules_to_save=["cls"], ensure_weight_tying=True)
    table = tied.get_submodule("bert.embeddings.word_embeddings")
    assert isinstance(table, TiedModule)
    assert table.weight is tied.get_submodule("cls.copies.default.predictions.decoder").weight
    with pytest.raises(AdapterError, match="name one of them"):
        names = ["word_embeddings", "cls"]
        add_adapter(
            build("BertForMaskedLM"),
            LoraConfig(r=2, target_modules=["query"], modules_to_save=names, ensure_weight_tying=True),
        )
