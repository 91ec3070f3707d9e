"""The interface of a LoRA variant, and its arguments: the record of one adapter on one layer, and the layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class KeptGain(NamedTuple):
    """A gain, and the dtype, scaling and tensors that it was computed from."""

    dtype: torch.dtype
    scaling: float
    gain: Tensor
    sources: tuple[Tensor, ...]


@dataclass(eq=False)
class AttachedAdapter:
    """One adapter on one layer.

    Attributes:
        parameters: table -> parameter: A, B, the variant's further parameters, a copy of the bias. While the adapter is
            attached, they are read from the layer's own tables.
        scaling: the factor on B @ A.
        variant: how the update enters the layer.
        dropout_p: probability of dropping an element of the adapter's input in training.
        matrices: names of A and B in `parameters`.
        kept_gain: the variant's gain, kept between forward passes without gradient.
    """

    parameters: Mapping[str, nn.Parameter]
    scaling: float
    variant: Variant
    dropout_p: float = 0.0
    matrices: tuple[str, str] = ("lora_A", "lora_B")
    kept_gain: KeptGain | None = None

    @property
    def lora_A(self) -> nn.Parameter:
        """A, (r, in_features), as the kind of layer shapes it."""
        return self.parameters[self.matrices[0]]

    @property
    def lora_B(self) -> nn.Parameter:
        """B, (out_features, r), as the kind of layer shapes it."""
        return self.parameters[self.matrices[1]]

    @property
    def offset(self) -> Tensor | None:
        """The vector added to the layer's bias, (out_features,), or None."""
        return self.variant.offset(self)


class FrozenWeight(Protocol):
    """The layer as a variant sees it: the frozen weight, as a matrix (out_features, in_features).

    Attributes:
        kept_of_base: tensors that variants have computed from the frozen weight, under names of their own.
    """

    in_features: int
    out_features: int
    kept_of_base: dict[str, Tensor]

    def matrix_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B at rank r; for a convolution they include the kernel's dimensions."""

    @property
    def has_bias(self) -> bool:
        """Whether the base layer has a `bias` attribute, even if it is None."""

    @property
    def device(self) -> torch.device:
        """The base weight's device."""

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the base weight in the shape the layer keeps it in, dense."""

    def base_rows(self, rows: slice) -> Tensor:
        """Return some rows of the base weight, (rows, in_features), in any dtype."""

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor of the base weight's shape as the matrix (out_features, in_features)."""

    def project(self, matrix: Tensor) -> Tensor:
        """Return matrix @ Wᵀ: (rows, in_features) -> (rows, out_features)."""

    def low_rank(self, lora_a: Tensor, lora_b: Tensor, x: Tensor) -> Tensor:
        """Return the layer's output for x, in the layer's output shape, with B @ A as its weight and no bias."""

    def apply_matrix(self, matrix: Tensor, x: Tensor) -> Tensor:
        """Return the layer's output for x with a matrix (out_features, in_features) as its weight and no bias."""


# A table of a layer -> how its tensor's name ends in PEFT's files, if the two differ.
PLAIN_ENDINGS = MappingProxyType({"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"})


class Variant:
    """How the update of one adapter enters a layer: W becomes gain * (W + update), row by row.

    One object serves all layers. An adapter's state is in its `AttachedAdapter`. The settings, files, merges, exports,
    inspection and the planner ask a variant for what they need to know and never compare its name.

    Attributes of the update:
        name: its key in `VARIANTS`.
        trained: names of the tables of further trained parameters.
        kept: names of the tables of parameters that the adapter needs but does not train.
        is_fused: whether A, B, scaling and gain describe it fully, so that a layer's fused function can compute it.
        has_gain: whether the gain can differ from 1.
        has_offset: whether it changes the layer's bias.
        is_factored: whether the update is the low-rank matrix of `factors`.
        row_lengths: name of the table with the length of each row of the adapted weight, or None.

    Attributes for users and files:
        title, meaning, scales: its name, its description and its effect on the base weight, in messages.
        not_low_rank: the message about an adapter where one that `is_low_rank` is needed.
        further: the name of its further trained parameters in messages.
        may_lack_further: whether a file may lack them; the adapter then has none.
        switch: PEFT's boolean setting that chooses it; None: `LoraConfig(variant=name)` does.
        is_of_starts: whether the start of an adapter chooses it instead of a setting.
        peft_type: the `peft_type` in its adapter_config.json. PEFT refuses the default, which it would misread.
        endings: table -> how its tensor's name ends in a file, if the two differ.
        old_endings: how tensor names ended in older files -> table.

    Attributes for the planner:
        rank_factor: the rank of the products, as a multiple of the adapter's rank.
        frozen_copies: number of copies of A and B that are held but not trained.
        joins_matrices: whether each product joins A and B with other matrices, which makes new tensors in any dtype.
        is_dense: whether x is multiplied by a matrix of the weight's size made from A and B, which the backward pass
            keeps.
    """

    name: str
    trained: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    is_fused: bool = True
    has_gain: bool = False
    has_offset: bool = False
    is_factored: bool = True
    row_lengths: str | None = None

    title: str
    meaning: str = "an update of another kind"
    scales: str = "scales the entries"
    not_low_rank: str = "has updates that are not of low rank; merge it into the base model, or train plain LoRA"
    further: str = "further parameters"
    may_lack_further: bool = False
    switch: str | None = None
    is_of_starts: bool = False
    peft_type: str = "LORAKIT"
    endings: Mapping[str, str] = PLAIN_ENDINGS
    old_endings: Mapping[str, str] = MappingProxyType({})

    rank_factor: int = 1
    frozen_copies: int = 0
    joins_matrices: bool = False
    is_dense: bool = False

    @property
    def is_low_rank(self) -> bool:
        """Whether the low-rank matrix of `factors` is the only change of the layer."""
        return self.is_factored and not self.has_gain and not self.has_offset

    @property
    def multiplies_base(self) -> bool:
        """Whether the change of the weight depends on the weight, so that merging another adapter would alter it."""
        return self.has_gain or not self.is_factored

    @property
    def setting(self) -> str:
        """The setting by which a user chooses it."""
        return self.switch or f"variant '{self.name}'"

    # ---- the update --------------------------------------------------------------------------------------------------

    def shapes(self, layer: FrozenWeight) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the further trained parameters: table name -> shape."""
        return dict.fromkeys(self.trained, (layer.out_features,))

    def problem(self, layer: FrozenWeight) -> str | None:
        """Return why this variant cannot adapt a layer, or None if it can."""
        return None

    def start(self, layer: FrozenWeight, adapter: AttachedAdapter) -> dict[str, Tensor]:
        """Return the initial values of the variant's parameters for the adapter's current A and B: table -> tensor.

        Trained parameters have the shapes that `shapes` states; kept ones have shapes of the variant's own.
        """
        return {}

    def gain(self, layer: FrozenWeight, adapter: AttachedAdapter, dtype: torch.dtype) -> Tensor | None:
        """Return the factor on each row of the adapted weight, (out_features,), fp32 or better, or None for 1.

        Args:
            dtype: dtype of the layer's products.
        """
        return None

    def offset(self, adapter: AttachedAdapter) -> Tensor | None:
        """Return the vector added to the layer's bias, (out_features,), or None."""
        return None

    def update(self, layer: FrozenWeight, adapter: AttachedAdapter, x: Tensor) -> Tensor:
        """Return the update's contribution to the layer's output for x, of the output's shape, before the gain."""
        return adapter.scaling * layer.low_rank(adapter.lora_A, adapter.lora_B, x)

    def factors(self, adapter: AttachedAdapter) -> tuple[Tensor, Tensor]:
        """Return the low-rank matrix as up (out_features, k), with the scaling, and down (k, in_features)."""
        return adapter.scaling * adapter.lora_B.flatten(1), adapter.lora_A.flatten(1)

    def delta(self, layer: FrozenWeight, adapter: AttachedAdapter) -> Tensor:
        """Return the change of the base weight, gain * (W + update) - W, as a matrix (out_features, in_features)."""
        up, down = self.factors(adapter)
        update = up @ down
        gain = self.gain(layer, adapter, update.dtype)
        if gain is None:
            return update
        weight = layer.as_matrix(layer.base_weight(update.dtype))
        return gain[:, None] * (weight + update) - weight

    # ---- files -------------------------------------------------------------------------------------------------------

    def reads(self, values: Mapping[str, Any]) -> bool:
        """Return whether the settings in an adapter_config.json describe an adapter of this variant."""
        if self.is_of_starts or values.get("peft_type") != self.peft_type:
            return False
        return bool(values.get(self.switch)) if self.switch else values.get("variant", "plain") == self.name

    def to_file(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of adapter_config.json for `LoraConfig`'s settings and those that PEFT adds."""
        return values

    def from_file(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return `LoraConfig`'s settings for the contents of an adapter_config.json, perhaps with other keys."""
        return values

    def file_tensors(self, adapter: AttachedAdapter) -> dict[str, Tensor]:
        """Return the tensors that a file holds of an adapter, without a trained bias: table -> tensor.

        A and B have the shapes of `matrix_shapes` at the file's rank, further parameters those of `shapes`.
        """
        return {table: adapter.parameters[table].detach() for table in (*adapter.matrices, *self.trained)}

    def file_shape(self, layer: FrozenWeight, table: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in a file of a table's parameter with this shape."""
        return shape

    # ---- costs -------------------------------------------------------------------------------------------------------

    def held_bytes(self, out_features: int) -> int:
        """Return the bytes that a layer keeps of what was computed from its base weight."""
        return 0

    def flops(self, rank: int, in_features: int, out_features: int) -> int:
        """Return those FLOPs of a forward pass that do not depend on the number of tokens."""
        return 0
