"""`Start`: what each start of an adapter does and declares; other modules read these attributes, never its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...layers import AdaptedLayer


@dataclass(frozen=True)
class StartData:
    """The data for a start, as given to `add_adapter`; empty where the start needs none.

    Attributes:
        losses: one scalar loss for each batch; taking the next one runs the model.
        sources: the weights before quantization, "<path of the layer>.weight" -> tensor in the layer's shape.
    """

    losses: Iterable[Tensor] = ()
    sources: Mapping[str, Tensor] = field(default_factory=dict)


class Start:
    """The first values of an adapter's A and B. One object serves all adapters, and no start writes to the base.

    `AdaptedLayer.add` draws A and B before `run` is called, in its own way for each kind of layer.

    Attributes:
        name: its value of `init_lora_weights`, and its key in `STARTS`.
        needs: the argument of `add_adapter` that it needs.
        is_neutral: whether `AdaptedLayer.add` draws A and B so that B A = 0.
        in_base: whether B A starts as a part of the base weight; the variant `residual` subtracts it again.
        peft_changes_base: whether PEFT changes the base weight for this start; its files fit that changed base alone.
        repairs_quantization: whether it starts at the quantization error, which a 16-bit base does not have.
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
        """Return this start if a value of `init_lora_weights`, in lower case, names it; otherwise None.

        A start with a number in its name returns one with that number.
        """
        return self if value == self.name else None

    @torch.no_grad()
    def run(self, layers: Mapping[str, AdaptedLayer], name: str, data: StartData) -> None:
        """Set A and B of adapter `name` in all layers, path -> layer. Here each layer is set by itself.

        Raises:
            AdapterError: the layers, their weights or the data do not allow it.
        """
        for layer in layers.values():
            self.set_layer(layer, name)

    def set_layer(self, layer: AdaptedLayer, name: str) -> None:
        """Set A and B of adapter `name` in one layer, for a start that needs only the layer itself."""
        raise NotImplementedError

    def summed_elements(self, in_features: int, out_features: int) -> int:
        """Return the number of fp32 sums over the data that it holds for a linear layer of this size."""
        return 0
