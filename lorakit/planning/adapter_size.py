"""What an adapter has at each module, found as `add_adapter` finds it, on a model without memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..adapters import LoraConfig, MatchReport
from ..adapters.attach.placement import Placement, plan_placements
from ..errors import ConfigError
from ..layers import VARIANTS, AdaptedLayer, SavedModule, TiedHead, Variant
from ..models.decoder.decoder import Decoder

FP32 = 4  # bytes of an element


@dataclass(frozen=True)
class AdapterSize:
    """What an adapter has at one module; the default is nothing.

    Attributes:
        trained: name of the table or parameter, and its elements.
        frozen: elements of fp32 matrices that are held and not trained: A under LoRA-FA, the start of PiSSA.
        rank: of the low-rank update; 0: there is none.
        variant: of the update.
        held: bytes that the variant keeps of the base weight.
        follows_embedding: what of the adapter's embedding is the weight of this output head: a copy, or trained rows.
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
        """Bytes of all that the adapter holds here, its gradients and the optimizer's state left out."""
        return FP32 * (sum(self.sizes) + self.frozen) + self.held

    @property
    def product_rank(self) -> int:
        """Rank of the products of the update."""
        return self.variant.rank_factor * self.rank

    def is_fused(self, dropout: bool) -> bool:
        """Return whether a linear layer and this adapter are one function."""
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
    """Return what an adapter has where: path of the module -> size.

    Args:
        model: a decoder, on the meta device too; it is not changed.
        lora_fa: whether the A of linear layers are frozen.

    Raises:
        AdapterError: `add_adapter` would raise it: something matches nothing, or cannot be trained so.
        ConfigError: what is to be trained cannot be planned.
    """
    if lora.target_parameters:
        raise ConfigError("target_parameters cannot be planned: name the layers in target_modules, where they are")
    report = MatchReport("default")
    placements = plan_placements(model, lora, report)
    if lora_fa and not any("lora_A" in placement.shapes for placement in placements):
        raise ConfigError("lora_fa freezes lora_A, but the adapter has none")
    found = {placement.path: _size(placement, lora, report, lora_fa) for placement in placements}
    if any(isinstance(placement.module, TiedHead) for placement in placements):
        is_copied = found["model.embed_tokens"].trains("weight")
        found["lm_head"] = AdapterSize(follows_embedding="copy" if is_copied else "rows")
    return found


def _size(placement: Placement, lora: LoraConfig, report: MatchReport, lora_fa: bool) -> AdapterSize:
    elements = {name: math.prod(shape) for name, shape in placement.shapes.items()}
    layer = placement.module
    if isinstance(layer, SavedModule):
        _check_saved(placement.path, layer.base_layer)
    if not isinstance(layer, AdaptedLayer):
        return AdapterSize(tuple(elements.items()))
    variant = lora.update_variant
    frozen = variant.frozen_copies * sum(elements[name] for name in layer.matrices)
    if lora_fa:  # which leaves alone the A of embeddings, as that has another name
        frozen += elements.pop("lora_A", 0)
    held = variant.held_bytes(layer.out_features)
    return AdapterSize(tuple(elements.items()), frozen, report.ranks[placement.path], variant, held)


def _check_saved(path: str, module: nn.Module) -> None:
    if not isinstance(module, nn.Linear | nn.Embedding) and path != "model.norm":
        raise ConfigError(
            f"{path} of modules_to_save is a {type(module).__name__}, which cannot be planned; linear layers, the "
            "embedding, the output head and the final norm can"
        )
