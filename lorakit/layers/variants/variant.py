"""What a variant of LoRA has to say, and what it is told: the record of one adapter on one layer, and the layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class KeptGain(NamedTuple):
    """A gain, and the dtype, scaling and values that it was computed for."""

    dtype: torch.dtype
    scaling: float
    gain: Tensor
    sources: tuple[Tensor, ...]


@dataclass(eq=False)
class AttachedAdapter:
    """One adapter on one layer.

    Attributes:
        parameters: A, B, what else the variant trains or keeps, a copy of the bias: table -> parameter. While the
            adapter is attached they are read from the layer's own tables.
        scaling: the factor on B @ A.
        variant: how the update enters the layer.
        dropout_p: probability with which numbers of the adapter's input are dropped in training.
        matrices: what A and B are called in `parameters`.
        kept_gain: the variant's gain, between forward passes without gradient.
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
        """What is added to the layer's bias, (out_features,), or None."""
        return self.variant.offset(self)


class FrozenWeight(Protocol):
    """What a variant may ask of the layer: all of it is about the frozen weight, a matrix (out_features, in_features).

    Attributes:
        kept_of_base: what variants have computed from the frozen weight and keep, by names of theirs.
    """

    in_features: int
    out_features: int
    kept_of_base: dict[str, Tensor]

    def matrix_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at rank r, those of a convolution with the dimensions of its kernel."""

    @property
    def has_bias(self) -> bool:
        """Whether the base layer has a place for a bias, empty or not."""

    @property
    def device(self) -> torch.device:
        """Where the base weight is."""

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the base weight in the shape the layer keeps it in, dense."""

    def base_rows(self, rows: slice) -> Tensor:
        """Return some rows of the base weight, (rows, in_features), in any dtype."""

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor of the base weight's shape as the matrix (out_features, in_features)."""

    def project(self, matrix: Tensor) -> Tensor:
        """Return matrix @ Wᵀ: (rows, in_features) -> (rows, out_features)."""

    def low_rank(self, lora_a: Tensor, lora_b: Tensor, x: Tensor) -> Tensor:
        """Return what the layer would with B @ A in the place of its weight and no bias."""

    def apply_matrix(self, matrix: Tensor, x: Tensor) -> Tensor:
        """Return what the layer would with a matrix (out_features, in_features) in the place of its weight, no bias."""


# A table of a layer -> how the name of its tensor ends in PEFT's files, where the two differ.
PLAIN_ENDINGS = MappingProxyType({"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"})


class Variant:
    """How the update of one adapter enters a layer: W becomes gain * (W + update), row by row.

    One object serves all layers; whatever belongs to an adapter is in its `AttachedAdapter`. The settings, files,
    merges, exports, inspection and the planner ask a variant what they have to know, and none asks for a name.

    Attributes of the update:
        name: its key in `VARIANTS`.
        trained: names of the tables of further trained parameters.
        kept: names of the tables of parameters that the adapter needs and nobody trains.
        is_fused: whether A, B, scaling and gain say it all, so that a layer's fused function may compute it.
        has_gain: whether the gain may differ from 1.
        has_offset: whether the layer's bias is changed.
        is_factored: whether the update is the low-rank matrix of `factors`.
        row_lengths: the table, if there is one, that holds the length of each row of the adapted weight.

    Attributes for users and files:
        title, meaning, scales: what messages call it, what they say of it, and of what it does to the base weight.
        not_low_rank: what messages say of an adapter where one that `is_low_rank` is needed.
        further: what messages call its further trained parameters.
        may_lack_further: whether a file without them means something: an adapter that has none.
        switch: PEFT's setting that chooses it, true or false; None: `LoraConfig(variant=name)` does.
        is_of_starts: whether the start of an adapter chooses it, and no setting.
        peft_type: of its adapter_config.json. PEFT refuses a file of the default, which it would misread.
        endings: table -> how the name of its tensor ends in a file, where the two differ.
        old_endings: how the names of tensors ended in older files -> table.

    Attributes for the planner:
        rank_factor: the rank of the products, in ranks of the adapter.
        frozen_copies: of A and B, that are held and not trained.
        joins_matrices: whether A and B are joined with others for each product, and so are new tensors in any dtype.
        is_dense: whether x is multiplied with a matrix of the weight's size that A and B make, which the backward pass
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
        """Whether the change of the weight is the low-rank matrix of `factors`, and there is no other change."""
        return self.is_factored and not self.has_gain and not self.has_offset

    @property
    def multiplies_base(self) -> bool:
        """Whether the change of the weight depends on the weight, so that another adapter's merge would change it."""
        return self.has_gain or not self.is_factored

    @property
    def setting(self) -> str:
        """How a user chooses it."""
        return self.switch or f"variant '{self.name}'"

    # ---- the update --------------------------------------------------------------------------------------------------

    def shapes(self, layer: FrozenWeight) -> dict[str, tuple[int, ...]]:
        """Return the trained tables' shapes: name of the table -> shape of an adapter's parameter."""
        return dict.fromkeys(self.trained, (layer.out_features,))

    def problem(self, layer: FrozenWeight) -> str | None:
        """Say why a layer cannot be adapted so, or None: it can."""
        return None

    def start(self, layer: FrozenWeight, adapter: AttachedAdapter) -> dict[str, Tensor]:
        """Return the first values of all tables, for the A and B that the adapter has by now."""
        return {}

    def gain(self, layer: FrozenWeight, adapter: AttachedAdapter, dtype: torch.dtype) -> Tensor | None:
        """Return the factor on each row of the adapted weight, (out_features,), fp32 or better, or None for 1.

        Args:
            dtype: of the layer's products.
        """
        return None

    def offset(self, adapter: AttachedAdapter) -> Tensor | None:
        """Return what is added to the layer's bias, (out_features,), or None."""
        return None

    def update(self, layer: FrozenWeight, adapter: AttachedAdapter, x: Tensor) -> Tensor:
        """Return what the update adds to the layer's output for x, before the gain."""
        return adapter.scaling * layer.low_rank(adapter.lora_A, adapter.lora_B, x)

    def factors(self, adapter: AttachedAdapter) -> tuple[Tensor, Tensor]:
        """Return the low-rank matrix as (up, down): (out_features, k), with the scaling, and (k, in_features)."""
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
        """Return whether the settings in an adapter_config.json are those of an adapter of this variant."""
        if self.is_of_starts or values.get("peft_type") != self.peft_type:
            return False
        return bool(values.get(self.switch)) if self.switch else values.get("variant", "plain") == self.name

    def to_file(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of adapter_config.json for the settings of `LoraConfig` and those that PEFT adds."""
        return values

    def from_file(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of `LoraConfig` for the contents of an adapter_config.json; it may have others too."""
        return values

    def file_tensors(self, adapter: AttachedAdapter) -> dict[str, Tensor]:
        """Return the tensors that a file has of an adapter, but for a trained bias: table -> tensor."""
        return {table: adapter.parameters[table].detach() for table in (*adapter.matrices, *self.trained)}

    def file_shape(self, layer: FrozenWeight, table: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a file has of a table's parameter."""
        return shape

    # ---- costs -------------------------------------------------------------------------------------------------------

    def held_bytes(self, out_features: int) -> int:
        """Return the bytes that a layer keeps of its base weight."""
        return 0

    def flops(self, rank: int, in_features: int, out_features: int) -> int:
        """Return the FLOPs of a forward pass that do not depend on the number of tokens."""
        return 0
