"""`LoraConfig`: what to adapt and how, under the names PEFT gave these settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from ..settings import Settings

_NOT_YET = "is not supported yet; this version trains plain LoRA and rsLoRA matrices on linear layers"


class LoraConfig(Settings):
    """Settings of one LoRA adapter (Hu et al. 2021, arXiv:2106.09685), with PEFT's field names and meanings.

    The update of a layer is `scaling * B @ A` with scaling = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`
    (Kalajdzievski 2023, arXiv:2312.03732).

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range, or a feature that is not supported yet.
    """

    r: int = Field(8, ge=1, description="rank of the update")
    lora_alpha: float = Field(8, gt=0, description="scaling is lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input while training")
    target_modules: list[str] | str = Field(
        "all-linear",
        description="name suffixes; one string is a regular expression on the whole name; 'all-linear' is every linear "
        "layer but the output head",
    )
    exclude_modules: list[str] | str | None = Field(None, description="the same syntax; taken out of target_modules")
    layers_to_transform: list[int] | int | None = Field(None, description="only these layer numbers")
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="name or regular expression -> rank, where it differs from r"
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="name or regular expression -> alpha, where it differs from lora_alpha"
    )
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r)")
    init_lora_weights: bool | Literal["gaussian"] = Field(
        True,
        description="true: A Kaiming-uniform and B zero; 'gaussian': A normal with deviation 1/r; false: B random too",
    )
    use_dora: bool = Field(False, description="weight-decomposed LoRA")
    modules_to_save: list[str] | None = Field(None, description="modules trained and saved in full")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which biases are trained")

    @field_validator("modules_to_save", "bias")
    @classmethod
    def _supported(cls, value: object) -> object:
        if value and value != "none":
            raise ValueError(_NOT_YET)
        return value

    @property
    def variant(self) -> str:
        """Name of the variant in `lorakit.layers.VARIANTS`."""
        return "dora" if self.use_dora else "plain"

    def scaling(self, rank: int, alpha: float) -> float:
        """Return the factor on B @ A for a layer of this rank and alpha."""
        return alpha / rank**0.5 if self.use_rslora else alpha / rank
