"""`Start`: what a way of starting an adapter says of itself. Every other module asks it, and none asks for a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...layers import AdaptedLayer


@dataclass(frozen=True)
class StartData:
    """What `add_adapter` was given for a start; empty where the start needs none of it.

    Attributes:
        losses: the loss of one batch after another; taking the next one runs the model.
        sources: the weights before they were quantized, "<path of the layer>.weight" -> tensor.
    """

    losses: Iterable[Tensor] = ()
    sources: Mapping[str, Tensor] = field(default_factory=dict)


class Start:
    """The first values of an adapter's A and B. One object serves all adapters, and no start writes to the base.

    `AdaptedLayer.add` has drawn A and B by the time that `run` is called, in its own way for each kind of layer.

    Attributes:
        name: its value of `init_lora_weights`, and its key in `STARTS`.
        needs: what `add_adapter` must be given for it.
        is_neutral: whether `AdaptedLayer.add` is to draw A and B such that B A = 0.
        in_base: whether B A starts as a part of the base weight, which the variant `residual` takes out again.
        peft_changes_base: whether PEFT changes the base weight for this start, so that its files fit that base alone.
        repairs_quantization: whether it starts at what quantization lost, which a 16-bit base still has.
        decomposes_weight: whether it decomposes each base weight in fp32.
    """

    name: bool | str
    needs: Literal["losses", "sources"] | None = None
    is_neutral: bool = True
    in_base: bool = False
    peft_changes_base: bool = False
    repairs_quantization: bool = False
    decomposes_weight: bool = False

    def named(self, value: bool | str) -> Start | None:
        """Return the start that a value of `init_lora_weights` in lower case names, or None if it is not this one.

        A start whose name holds a number returns itself with that number.
        """
        return self if value == self.name else None

    @torch.no_grad()
    def run(self, layers: Mapping[str, AdaptedLayer], name: str, data: StartData) -> None:
        """Set A and B of adapter `name` in all layers, path -> layer. As it stands here: in each layer by itself.

        Raises:
            AdapterError: the layers, their weights or the data do not allow it.
        """
        for layer in layers.values():
            self.set_layer(layer, name)

    def set_layer(self, layer: AdaptedLayer, name: str) -> None:
        """Set A and B of adapter `name` in one layer, for a start that needs no more than the layer itself."""
        raise NotImplementedError

    def summed_elements(self, in_features: int, out_features: int) -> int:
        """Return how many fp32 numbers it sums up over the data for a linear layer of this size."""
        return 0
