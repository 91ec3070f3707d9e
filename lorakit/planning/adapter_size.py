"""The size of an adapter at each module, found as `add_adapter` finds it, on a model without memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..adapters import LoraConfig, MatchReport
from ..adapters.attach.placed import Placement
from ..adapters.attach.placement import plan_placements
from ..errors import ConfigError
from ..layers import VARIANTS, AdaptedLayer, SavedModule, TiedModule, Variant
from ..models.decoder.decoder import Decoder

FP32 = 4  # bytes of an element


@dataclass(frozen=True)
class AdapterSize:
    """The size of an adapter at one module; the default is nothing.

    Attributes:
        trained: (name of a table or parameter, its elements) for each that is trained.
        frozen: elements of fp32 matrices that are held but not trained: A under LoRA-FA, the start of PiSSA.
        rank: rank of the low-rank update; 0: there is none.
        variant: variant of the update.
        held: bytes that the variant keeps of the base weight.
        follows_embedding: for a tied output head, whether its weight is the adapter's copy of the embedding or has the
            adapter's trained rows; else None.
    """

    trained: tuple[tuple[str, int], ...] = ()
    frozen: int = 0
    rank: int = 0
    variant: Variant = VARIANTS["plain"]
    held: int = 0
    follows_embedding: Literal["copy", "rows"] | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of every trained parameter."""
        return tuple(size for _, size in self.trained)

    @property
    def nbytes(self) -> int:
        """Bytes that the adapter holds here, without gradients and optimizer state."""
        return FP32 * (sum(self.sizes) + self.frozen) + self.held

    @property
    def product_rank(self) -> int:
        """Rank of the update's products."""
        return self.variant.rank_factor * self.rank

    def is_fused(self, dropout: bool) -> bool:
        """Return whether a linear layer and this adapter run as one function."""
        return (
            self.rank > 0
            and self.variant.is_fused
            and not (dropout and self.variant.has_gain)
            and not self.trains("trained_bias")
        )

    def trains(self, name: str) -> bool:
        """Return whether a table or parameter of this name is trained."""
        return any(name == one for one, _ in self.trained)


def adapter_sizes(model: Decoder, lora: LoraConfig, lora_fa: bool) -> dict[str, AdapterSize]:
    """Return path of a module -> the adapter's size there.

    Args:
        model: a decoder, possibly on the meta device; it is not changed.
        lora_fa: whether the A of linear layers are frozen.

    Raises:
        AdapterError: `add_adapter` would raise it: a target matches nothing, or cannot be trained this way.
        ConfigError: the adapter trains a module that cannot be planned.
    """
    if lora.target_parameters:
        raise ConfigError("target_parameters cannot be planned; if they belong to layers, name these in target_modules")
    report = MatchReport("default")
    placements = plan_placements(model, lora, report)
    if lora_fa and not any("lora_A" in placement.shapes for placement in placements):
        raise ConfigError("lora_fa freezes lora_A, but the adapter has none")
    sizes = {placement.path: _size(placement, lora, report, lora_fa) for placement in placements}
    if any(isinstance(placement.module, TiedModule) for placement in placements):
        is_copied = sizes["model.embed_tokens"].trains("weight")
        sizes["lm_head"] = AdapterSize(follows_embedding="copy" if is_copied else "rows")
    return sizes


def _size(placement: Placement, lora: LoraConfig, report: MatchReport, lora_fa: bool) -> AdapterSize:
    elements = {name: math.prod(shape) for name, shape in placement.shapes.items()}
    layer = placement.module
    if isinstance(layer, SavedModule):
        _check_saved(placement.path, layer.base_layer)
    if not isinstance(layer, AdaptedLayer):
        return AdapterSize(tuple(elements.items()))
    variant = lora.update_variant
    frozen = variant.frozen_copies * sum(elements[name] for name in layer.matrices)
    if lora_fa:  # the A of an embedding has another name and is still trained
        frozen += elements.pop("lora_A", 0)
    held = variant.held_bytes(layer.out_features)
    return AdapterSize(tuple(elements.items()), frozen, report.ranks[placement.path], variant, held)


def _check_saved(path: str, module: nn.Module) -> None:
    if not isinstance(module, nn.Linear | nn.Embedding) and path != "model.norm":
        raise ConfigError(
            f"{path} of modules_to_save is a {type(module).__name__}, which cannot be planned; linear layers, the "
            "embedding, the output head and the final norm can"
        )
