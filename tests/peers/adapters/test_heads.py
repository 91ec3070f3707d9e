"""Models with heads of all kinds: PEFT computes the same from lorakit's files, and lorakit from PEFT's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import lorakit as lk

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BERT = tf.BertConfig(vocab_size=60, num_labels=3, **SIZES)
QWEN = tf.Qwen3Config(vocab_size=60, num_key_value_heads=2, head_dim=8, num_labels=3, pad_token_id=0, **SIZES)
T5 = tf.T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, num_labels=3, pad_token_id=0,
                 eos_token_id=1, decoder_start_token_id=0)  # fmt: skip
BART = tf.BartConfig(vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                     decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_labels=3, eos_token_id=2,
                     max_position_embeddings=32)  # fmt: skip
WHISPER = tf.WhisperConfig(vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                           decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20,
                           num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                           decoder_start_token_id=3)  # fmt: skip
VIT = tf.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES)
GPT2 = tf.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, num_labels=3, pad_token_id=0)
ROBERTA = tf.RobertaConfig(vocab_size=60, num_labels=3, max_position_embeddings=32, **SIZES)

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
IDS[:, -1] = 2
TEXT, PAIR = {"input_ids": IDS}, {"input_ids": IDS, "decoder_input_ids": IDS}
SOUND = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": IDS[:, :5]}
PIXELS = {"pixel_values": torch.randn(2, 3, 8, 8)}

# Class of a model, its config, its inputs, the layers to adapt, and the task that PEFT is told.
HEADS: dict[str, tuple[Any, Any, dict[str, Tensor], list[str] | str, str | None]] = {
    "causal": (tf.Qwen3ForCausalLM, QWEN, TEXT, ["q_proj", "v_proj"], "CAUSAL_LM"),
    "causal, Conv1D": (tf.GPT2LMHeadModel, GPT2, TEXT, ["c_attn"], "CAUSAL_LM"),
    "encoder-decoder": (tf.T5ForConditionalGeneration, T5, PAIR, ["q", "v"], "SEQ_2_SEQ_LM"),
    "another encoder-decoder": (tf.BartForConditionalGeneration, BART, PAIR, ["q_proj"], "SEQ_2_SEQ_LM"),
    "sequences, encoder": (tf.BertForSequenceClassification, BERT, TEXT, ["query", "value"], "SEQ_CLS"),
    "sequences, decoder": (tf.Qwen3ForSequenceClassification, QWEN, TEXT, ["q_proj"], "SEQ_CLS"),
    "sequences, head of two layers": (tf.RobertaForSequenceClassification, ROBERTA, TEXT, "all-linear", "SEQ_CLS"),
    "sequences, encoder-decoder": (tf.BartForSequenceClassification, BART, TEXT, ["q_proj"], None),
    "tokens": (tf.BertForTokenClassification, BERT, TEXT, ["query", "value"], "TOKEN_CLS"),
    "answers": (
        tf.BertForQuestionAnswering,
        tf.BertConfig(vocab_size=60, num_labels=2, **SIZES),
        TEXT,
        ["query", "value"],
        "QUESTION_ANS",
    ),
    "features": (tf.BertModel, BERT, TEXT, ["query", "value"], "FEATURE_EXTRACTION"),
    "features, encoder-decoder": (tf.T5Model, T5, PAIR, ["q", "v"], "FEATURE_EXTRACTION"),
    "masked": (tf.BertForMaskedLM, BERT, TEXT, ["query", "value"], None),
    "speech": (tf.WhisperForConditionalGeneration, WHISPER, SOUND, ["q_proj"], None),
    "images": (tf.ViTForImageClassification, VIT, PIXELS, "all-linear", None),
    "images, features": (tf.ViTModel, VIT, PIXELS, "all-linear", None),
}


def make(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(config).eval()
    return model


def result(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        outputs = model(**inputs)
    first: Tensor = outputs[0]
    return first


@pytest.mark.parametrize(("kind", "config", "inputs", "targets", "task"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("saves_head", [True, False])
def test_peft_computes_the_same(
    kind: Any,
    config: Any,
    inputs: dict[str, Tensor],
    targets: list[str] | str,
    task: str | None,
    saves_head: bool,
    tmp_path: Path,
) -> None:
    ours = make(kind, config)
    head = next((name for name, _ in ours.named_children() if name in ("classifier", "score", "qa_outputs")), None)
    saved = [head] if saves_head and head else None
    if not saves_head and task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        task = None  # with a task, PEFT expects the head in the file
    lk.add_adapter(ours, lk.LoraConfig(r=4, target_modules=targets, modules_to_save=saved, init_lora_weights=False))
    for parameter in lk.adapter_parameters(ours):
        parameter.data += 0.01
    folder = lk.save_adapter(ours, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == task
    theirs = peft.PeftModel.from_pretrained(make(kind, config), folder).eval()
    assert type(theirs).__name__ == {
        None: "PeftModel", "CAUSAL_LM": "PeftModelForCausalLM", "SEQ_2_SEQ_LM": "PeftModelForSeq2SeqLM",
        "SEQ_CLS": "PeftModelForSequenceClassification", "TOKEN_CLS": "PeftModelForTokenClassification",
        "QUESTION_ANS": "PeftModelForQuestionAnswering", "FEATURE_EXTRACTION": "PeftModelForFeatureExtraction",
    }[task]  # fmt: skip
    found, expected = result(theirs, inputs), result(ours, inputs)
    assert not torch.equal(expected, result(make(kind, config), inputs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("saves", [None, "classifier"])
@pytest.mark.parametrize(("kind", "config", "inputs", "targets", "task"), HEADS.values(), ids=HEADS)
def test_lorakit_computes_the_same(
    kind: Any,
    config: Any,
    inputs: dict[str, Tensor],
    targets: list[str] | str,
    task: str | None,
    saves: str | None,
    tmp_path: Path,
) -> None:
    if saves and not any(name == saves for name, _ in make(kind, config).named_children()):
        saves = None
    settings: dict[str, Any] = {"modules_to_save": [saves] if saves else None, "target_modules": targets}
    if saves:
        settings["exclude_modules"] = rf"{saves}.*"
    asked = peft.LoraConfig(task_type=task, r=4, init_lora_weights=False, **settings)
    theirs = peft.get_peft_model(make(kind, config), asked).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = make(kind, config)
    lk.load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(result(ours, inputs), result(theirs, inputs))
    lk.save_adapter(ours, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["task_type"] == task


def test_modules_that_peft_saved_by_the_end_of_their_names(tmp_path: Path) -> None:
    """To PEFT "norm" also names q_norm and input_layernorm."""
    asked = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False)
    theirs = peft.get_peft_model(make(tf.Qwen3ForCausalLM, QWEN), asked).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.rand(parameter.shape))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = make(tf.Qwen3ForCausalLM, QWEN)
    lk.load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(result(ours, TEXT), result(theirs, TEXT))
    again = make(tf.Qwen3ForCausalLM, QWEN)
    lk.load_adapter(again, lk.save_adapter(ours, tmp_path / "again"))
    assert torch.equal(result(again, TEXT), result(ours, TEXT))


class TestConfigs:
    """PEFT's LoraConfig, given to lorakit."""

    @pytest.mark.parametrize(
        "settings",
        [
            {"task_type": "CAUSAL_LM", "use_rslora": True, "lora_dropout": 0.1},
            {"use_dora": True, "exclude_modules": ["v_proj"]},
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "layers_to_transform": [1]},
            {"bias": "lora_only", "modules_to_save": ["norm"], "revision": "main"},
            {"target_modules": r".*\.(q|k)_proj"},
            {"target_modules": "all-linear"},
        ],
    )
    def test_it_is_taken_over(self, settings: dict[str, Any]) -> None:
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]} | settings)
        ours, theirs = make(tf.Qwen3ForCausalLM, QWEN), make(tf.Qwen3ForCausalLM, QWEN)
        lk.add_adapter(ours, config)
        model = peft.get_peft_model(theirs, config)
        expected = {
            n.removeprefix("base_model.model."): p.shape for n, p in model.named_parameters() if p.requires_grad
        }
        assert sum(p.numel() for p in lk.adapter_parameters(ours)) == sum(s.numel() for s in expected.values())

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (lambda: peft.LoraConfig(), "names no target_modules"),
            (lambda: peft.LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2)]), "sets layer_replication"),
            (lambda: peft.LoraConfig(target_modules=["q_proj"], megatron_config={"a": 1}), "sets megatron_config"),
            (lambda: peft.LoHaConfig(target_modules=["q_proj"]), "LoHaConfig is of the kind LOHA"),
            (lambda: {"r": 8}, r"got dict: write LoraConfig\(\*\*values\)|got a dict: write"),
        ],
    )
    def test_what_cannot_be_taken_over_is_named(self, config: Callable[[], Any], message: str) -> None:
        model = make(tf.Qwen3ForCausalLM, QWEN)
        with pytest.raises(lk.LorakitError, match=message):
            lk.add_adapter(model, config())
        assert not lk.adapter_status(model).adapters

    def test_the_head_of_a_task_is_trained_as_in_peft(self) -> None:
        model = make(tf.BertForSequenceClassification, BERT)
        report = lk.add_adapter(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
        assert report.saved == {"classifier": ["classifier"]}

    def test_a_model_of_peft_is_refused(self, tmp_path: Path) -> None:
        base = make(tf.Qwen3ForCausalLM, QWEN)
        theirs = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        for call in (
            lambda: lk.add_adapter(theirs, lk.LoraConfig()),
            lambda: lk.save_adapter(theirs, tmp_path / "adapter"),
            lambda: lk.load_adapter(theirs, lk.save_adapter(adapted(), tmp_path / "ours")),
            lambda: lk.merge_adapter(theirs),
            lambda: lk.adapter_status(theirs),
            lambda: lk.set_adapter(theirs, []),
        ):
            with pytest.raises(lk.LorakitError, match="this is PEFT's PeftModel"):
                call()
        with pytest.raises(lk.LorakitError, match=r"PEFT has put an adapter into this model: model\.layers\.0"):
            lk.add_adapter(base, lk.LoraConfig())
        lk.add_adapter(theirs.unload(), lk.LoraConfig())


def adapted() -> nn.Module:
    model = make(tf.Qwen3ForCausalLM, QWEN)
    lk.add_adapter(model, lk.LoraConfig(r=2))
    return model
