"""HiRA: the update multiplies the base weight element by element (Huang et al. 2025, ICLR, TwJrTz9cRS, eq. 4).

    W' = W + s W ∘ (B A)

The change of the weight has up to r times the rank of W; LoRA's change has rank r. In PEFT, HiRA is a method of its
own whose files have no alpha: s is 1 there and goes into B. Each forward pass makes a matrix M of the weight's size.
Its gradient needs W, which the layer has. It does not need the product B A, which is not kept:

    M = W ∘ (s B A),  dP = W ∘ dM,  dA = s Bᵀ dP,  dB = s dP Aᵀ
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from lorakit_kernels import is_transformed
from torch import Tensor

from .variant import AttachedAdapter, FrozenWeight, Variant

_SHARED = (  # settings that mean the same in PEFT's HiraConfig
    "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "task_type",
)  # fmt: skip
_OURS = ("bias", "ensure_weight_tying", "trainable_token_indices")  # PEFT's reader ignores them


class HiRA(Variant):
    """Plain A and B, whose product multiplies the base weight element by element."""

    name = "hira"
    is_fused = False
    is_factored = False

    title = "HiRA"
    meaning = "HiRA, which multiplies the base weight element by element"
    not_low_rank = (
        "is a HiRA adapter: its change of the base, W * (s BA) element by element, is not of low rank; merge it into "
        "the base model, or train plain LoRA"
    )
    peft_type = "HIRA"
    endings = MappingProxyType(
        {
            "lora_A": "hira_A",
            "lora_B": "hira_B",
            "lora_embedding_A": "hira_embedding_A",
            "lora_embedding_B": "hira_embedding_B",
        }
    )
    is_dense = True

    def update(self, layer: FrozenWeight, adapter: AttachedAdapter, x: Tensor) -> Tensor:
        dtype = x.dtype if x.is_floating_point() else adapter.lora_A.dtype  # ids have no float dtype
        return layer.apply_matrix(_multiplied(layer, adapter, dtype), x)

    def delta(self, layer: FrozenWeight, adapter: AttachedAdapter) -> Tensor:
        return _multiplied(layer, adapter, adapter.lora_A.dtype)

    def reads(self, values: Mapping[str, Any]) -> bool:
        return values.get("peft_type") == self.peft_type

    def to_file(self, values: dict[str, Any]) -> dict[str, Any]:
        shared = {key: values[key] for key in _SHARED}
        ours = {key: values[key] for key in _OURS if values[key] not in (None, "none", False)}
        return shared | ours | {"hira_dropout": values["lora_dropout"], "init_weights": True}

    def from_file(self, values: dict[str, Any]) -> dict[str, Any]:
        rank = values.get("r", 32)  # PEFT's default
        patterns = values.get("rank_pattern") or {}
        known = {key: values[key] for key in (*_SHARED, *_OURS) if key in values}
        alphas = {"lora_alpha": rank, "alpha_pattern": patterns}  # a scaling of 1 everywhere
        return known | alphas | {"r": rank, "lora_dropout": values.get("hira_dropout", 0.0), "variant": self.name}

    def file_tensors(self, adapter: AttachedAdapter) -> dict[str, Tensor]:
        tables = zip(adapter.matrices, (adapter.lora_A, adapter.scaling * adapter.lora_B), strict=True)
        return {table: matrix.detach() for table, matrix in tables}

    def flops(self, rank: int, in_features: int, out_features: int) -> int:
        """Return the FLOPs of B A."""
        return 2 * rank * in_features * out_features


def _multiplied(layer: FrozenWeight, adapter: AttachedAdapter, dtype: torch.dtype) -> Tensor:
    """Return W ∘ (s B A), (out_features, in_features) in `dtype`."""
    up, down = adapter.scaling * adapter.lora_B.flatten(1), adapter.lora_A.flatten(1)
    if is_transformed():
        return (up @ down).to(dtype) * layer.as_matrix(layer.base_weight(dtype))
    product: Tensor = _Multiplied.apply(up.to(dtype), down.to(dtype), layer)
    return product


class _Multiplied(torch.autograd.Function):
    """M = W ∘ (U D). Each pass takes the weight from the layer.

    Shapes:
        up U (out_features, r), down D (r, in_features) -> (out_features, in_features)
    """

    @staticmethod
    def forward(ctx: Any, up: Tensor, down: Tensor, layer: FrozenWeight) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(up, down)
        return (up @ down).mul_(layer.as_matrix(layer.base_weight(up.dtype)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        up, down = ctx.saved_tensors
        gradient = grads[0] * ctx.layer.as_matrix(ctx.layer.base_weight(up.dtype))
        train_up, train_down, _ = ctx.needs_input_grad
        return gradient @ down.T if train_up else None, up.T @ gradient if train_down else None, None
