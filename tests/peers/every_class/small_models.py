"""Small random models of transformers' classes: a config of a few thousand weights for each, and an input.

Most configs come from one rule: every size that a config class knows by a usual name becomes a small one. `MORE` has
the rest, such as sizes that must be multiples of another.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: nothing is downloaded

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TASKS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "ctc": modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
    "audio": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "speech": {"whisper": "WhisperForConditionalGeneration", "speech_to_text": "Speech2TextForConditionalGeneration"},
}
MOST_WEIGHTS = 6_000_000
VOCABULARY, IMAGE, SAMPLES = 99, 32, 4000
_WIDTH = (
    "hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "word_embed_proj_dim",
    "encoder_embed_dim", "decoder_embed_dim",
)  # fmt: skip
_INNER = (
    "hidden_dim", "intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim",
    "ffn_hidden_size", "d_inner",
)  # fmt: skip
_LAYERS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_encoder_layers",
    "num_decoder_layers",
)  # fmt: skip
_HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
    "num_experts", "num_local_experts", "n_routed_experts",
)  # fmt: skip
_POSITIONS = ("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions")
SIZES: dict[str, Any] = {
    **dict.fromkeys(_WIDTH, 32), **dict.fromkeys(_INNER, 48), **dict.fromkeys(_LAYERS, 2), **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_POSITIONS, 64), "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "moe_intermediate_size": 16,
    "num_experts_per_tok": 2, "vocab_size": VOCABULARY, "image_size": IMAGE, "patch_size": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "num_labels": 3,
}  # fmt: skip
_SPEECH = {
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_codevectors_per_group": 8,
    "codevector_dim": 16, "proj_codevector_dim": 16, "tdnn_dim": (16, 16), "tdnn_kernel": (3, 1),
    "tdnn_dilation": (1, 1), "xvector_output_dim": 16, "classifier_proj_size": 16, "adapter_stride": 1,
}  # fmt: skip
_LATENT = {
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "num_key_value_heads": 4,
}
_VISION = {
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": IMAGE, "patch_size": 8,
    },
}  # fmt: skip
_STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 16}
MORE: dict[str, dict[str, Any]] = {
    "bit": {**_STAGES, "num_groups": 8},
    "clip": _VISION,
    "codegen": {"rotary_dim": 4},
    "convnext": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    "convnextv2": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3", "youtu", "glm4_moe_lite"), _LATENT),
    "focalnet": {"embed_dim": 16, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8, "n_groups": 2, "state_size": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "poolformer": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "prophetnet": {"num_hidden_layers": None},
    "pvt": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4]},
    "regnet": {**_STAGES, "groups_width": 8},
    "resnet": _STAGES,
    "roc_bert": {"pronunciation_vocab_size": 90, "shape_vocab_size": 90},
    "siglip": _VISION,
    "speech_to_text": {"conv_channels": 16, "input_feat_per_channel": 8},
    "swiftformer": {"depths": [1, 1, 1, 1], "embed_dims": [16, 16, 32, 32]},
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 4},
    "swinv2": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 4},
    "whisper": {"num_mel_bins": 8, "max_source_positions": 20},
    **dict.fromkeys(
        ("data2vec-audio", "hubert", "sew", "unispeech", "unispeech-sat", "wav2vec2", "wavlm", "wav2vec2-conformer"),
        _SPEECH,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ModelClass:
    """A class of transformers.

    Attributes:
        task: key of TASKS.
        model_type: the config's name in transformers.
        name: of the class.
    """

    task: str
    model_type: str
    name: str

    def __str__(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        """Return the model in fp32, always with the same weights, frozen, in eval mode.

        Raises:
            ValueError: the class has no small config here.
        """
        config = small_config(self.model_type)
        kind = getattr(transformers, self.name)
        with torch.device("meta"):
            weights = sum(parameter.numel() for parameter in kind(config).parameters())
        if weights > MOST_WEIGHTS:
            raise ValueError(f"{self.name}: {weights:,} weights")
        torch.manual_seed(0)
        model: nn.Module = kind(config)
        for module in model.modules():  # transformers' own draws are so small that deep networks give zeros
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and module.weight.numel():
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        return model.eval().requires_grad_(False)

    def inputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the arguments of a forward pass, always the same."""
        generator = torch.Generator().manual_seed(1)
        if self.task in ("causal", "masked", "seq2seq"):
            ids = torch.randint(3, VOCABULARY - 9, (2, 7), generator=generator)
            return {"input_ids": ids} if self.task != "seq2seq" else {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
        if self.task == "speech":
            ids = torch.randint(3, VOCABULARY - 9, (2, 5), generator=generator)
            shape = (2, 8, 40) if self.model_type == "whisper" else (2, 40, 8)  # whisper has the frequencies first
            return {"input_features": torch.randn(shape, generator=generator), "decoder_input_ids": ids}
        if self.task == "image":
            channels = getattr(model.config, "num_channels", 3)
            return {"pixel_values": torch.randn(2, channels, IMAGE, IMAGE, generator=generator)}
        return {"input_values": torch.randn(2, SAMPLES, generator=generator)}


def small_config(model_type: str) -> Any:
    """Return a config of a model type with small sizes."""
    kind = CONFIG_MAPPING[model_type]
    default, given = kind(), {}
    for name, size in SIZES.items():
        value = getattr(default, name, None)
        known = isinstance(value, int) and not isinstance(value, bool)
        is_settable = not isinstance(getattr(kind, name, None), property) or getattr(kind, name).fset is not None
        if is_settable and (
            known or (name in ("pad_token_id", "num_key_value_heads", "head_dim") and hasattr(default, name))
        ):
            given[name] = size
    types = getattr(default, "layer_types", None)
    if types and not isinstance(getattr(kind, "layer_types", None), property):
        given["layer_types"] = [types[0], next((other for other in types if other != types[0]), types[0])]
    given |= MORE.get(model_type, {})
    return kind(**{name: value for name, value in given.items() if value is not None})


def classes() -> list[ModelClass]:
    """Return every class of the tasks above, by task and name; not all of them can be built."""
    found = {}
    for task, names in TASKS.items():
        for model_type, name in names.items():
            name = name[0] if isinstance(name, (tuple, list)) else name
            is_better = name not in found or model_type.endswith("_text")  # the config of the text model alone
            if is_better and hasattr(transformers, name):
                found[name] = ModelClass(task, model_type, name)
    return sorted(found.values(), key=lambda each: (list(TASKS).index(each.task), each.name))
