"""Adapters on every layer of transformers models that read weights, scale embeddings or route with layers of their own.

Each model computes the same after the update has been added to its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from tolerances import assert_alike
from torch import Tensor, nn

from lorakit import LoraConfig, adapter_parameters, add_adapter, merge_adapter
from lorakit.layers import LAYER_KINDS, LoRAConv, LoRAEmbedding, LoRALinear, adapted_kind

VOCABULARY, WIDTH = 60, 32
TERMS = 1 << 14  # roundings through a model of two layers at most, of width 48 at most, and its convolutions
IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
HEADS: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 4}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 4,
}
DECODER: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, **HEADS}
ROUTED: dict[str, Any] = {**DECODER, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0,
                          "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(tf.T5Config(**T5))


def bart() -> nn.Module:
    return tf.BartForConditionalGeneration(tf.BartConfig(**SEQ2SEQ, max_position_embeddings=64, scale_embedding=True))


def biogpt() -> nn.Module:
    return tf.BioGptForCausalLM(tf.BioGptConfig(**DECODER, max_position_embeddings=64))


def gemma3() -> nn.Module:
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**DECODER, num_key_value_heads=2, head_dim=8))


def opt() -> nn.Module:
    sizes: dict[str, Any] = {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": WIDTH}
    return tf.OPTForCausalLM(tf.OPTConfig(**DECODER, **sizes))


def whisper() -> nn.Module:
    sizes: dict[str, Any] = {"max_source_positions": 16, "max_target_positions": 32, "num_mel_bins": 3}
    tokens: dict[str, Any] = {"pad_token_id": 0, "decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**SEQ2SEQ, **sizes, **tokens))


def prophetnet() -> nn.Module:
    config = tf.ProphetNetConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_encoder_layers=1, num_decoder_layers=1, encoder_ffn_dim=48,
        num_encoder_attention_heads=4, num_decoder_attention_heads=4, decoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    return tf.ProphetNetForConditionalGeneration(config)


def mamba() -> nn.Module:
    return tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, state_size=4)
    )


def falcon() -> nn.Module:
    return tf.FalconForCausalLM(tf.FalconConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, **HEADS))


def phimoe() -> nn.Module:
    return tf.PhimoeForCausalLM(tf.PhimoeConfig(**ROUTED))


def llama4() -> nn.Module:
    sizes: dict[str, Any] = {"head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 64}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**ROUTED, **sizes))


def vit() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 48, "image_size": 32, "patch_size": 16}
    return tf.ViTForImageClassification(tf.ViTConfig(**sizes, **HEADS))


def bit() -> nn.Module:
    sizes: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1]}
    return tf.BitForImageClassification(tf.BitConfig(**sizes, num_groups=4))


PAIR = {"input_ids": IDS, "decoder_input_ids": IDS}
MODELS: dict[Callable[[], nn.Module], dict[str, Tensor]] = {
    t5: PAIR,
    bart: PAIR,
    prophetnet: PAIR,
    whisper: {"input_features": PIXELS[:, :, 0], "decoder_input_ids": IDS},
    **{make: {"input_ids": IDS} for make in (biogpt, gemma3, opt, mamba, falcon, phimoe, llama4)},
    **{make: {"pixel_values": PIXELS} for make in (vit, bit)},
}


@pytest.mark.parametrize("kind", LAYER_KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_model_with_adapters_is_the_model_with_updated_weights(
    make: Callable[[], nn.Module], kind: type[LoRALinear | LoRAEmbedding | LoRAConv]
) -> None:
    torch.manual_seed(0)
    model, batch = make().eval().requires_grad_(False), MODELS[make]
    targets = [path for path, layer in model.named_modules() if path and adapted_kind(layer) is kind]
    if not targets:
        return  # this model has no such layer
    expected = model(**batch).logits
    add_adapter(model, LoraConfig(r=4, target_modules=targets))
    with torch.no_grad():
        assert_alike(model(**batch).logits, expected, TERMS)  # B or A is zero
        for parameter in adapter_parameters(model):
            parameter += 0.05 * torch.randn_like(parameter)
        adapted = model(**batch).logits
        merged = copy.deepcopy(model)
        merge_adapter(merged, base=False)
        assert not torch.allclose(adapted, expected, rtol=1e-3)
        assert_alike(adapted, merged(**batch).logits, TERMS)


@pytest.mark.parametrize("make", [t5, mamba, gemma3, bart], ids=lambda make: make.__name__)
def test_default_targets_train(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().train()
    add_adapter(model, LoraConfig(r=4, init_lora_weights=False))
    model(**MODELS[make], labels=IDS).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter_parameters(model))
