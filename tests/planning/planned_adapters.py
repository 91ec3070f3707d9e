"""What adapters can be made of: the settings that the tests of planning go through."""

from __future__ import annotations

from typing import Any

ADAPTERS: list[dict[str, Any]] = [
    {"use_dora": True},
    {"use_dora": True, "target_modules": ["q_proj", "o_proj", "up_proj", "embed_tokens", "lm_head"]},
    {"use_dora": True, "bias": "lora_only", "target_modules": ["v_proj", "down_proj"]},
    {"lora_bias": True, "target_modules": ["k_proj", "v_proj", "down_proj"]},
    {"variant": "hira"},
    {"variant": "hira", "target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]},
    {"bias": "lora_only"},
    {"bias": "all", "target_modules": ["v_proj", "gate_proj"]},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "pissa", "target_modules": ["o_proj", "embed_tokens", "lm_head"]},
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"modules_to_save": ["embed_tokens", "norm"], "ensure_weight_tying": False, "target_modules": []},
    {"modules_to_save": ["lm_head", "down_proj"], "target_modules": ["q_proj", "k_proj"]},
    {"trainable_token_indices": [3, 5, 9]},
    {"trainable_token_indices": [3, 5], "target_modules": ["q_proj"], "use_dora": True},
]
