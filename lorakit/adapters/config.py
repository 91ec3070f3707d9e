"""`LoraConfig`: what to adapt and how, with PEFT's names for the settings."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..errors import AdapterError, did_you_mean
from ..layers import VARIANTS, Variant
from ..settings import Settings
from .starts import Start, find_start, start_names

Task = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
Token = Annotated[int, Field(ge=0)]
# The heads that PEFT trains and saves in full for a task.
TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}

# Names of settings in other programs and in Python calls of them -> the name here; "" is not needed here.
_OTHER_NAMES = {
    "rank": "r", "lora_r": "r", "lora_rank": "r", "dim": "r", "alpha": "lora_alpha", "dropout": "lora_dropout",
    "targets": "target_modules", "target": "target_modules", "modules": "target_modules", "keys": "target_modules",
    "lora_target": "target_modules", "lora_target_modules": "target_modules", "lora_modules": "target_modules",
    "lora_attn_modules": "target_modules", "lora_modules_to_save": "modules_to_save", "dora": "use_dora",
    "rslora": "use_rslora", "use_rs_lora": "use_rslora", "init": "init_lora_weights", "layers": "layers_to_transform",
    "lora_layers": "layers_to_transform", "exclude": "exclude_modules", "trainable_modules": "modules_to_save",
    "peft_type": "", "inference_mode": "", "fan_in_fan_out": "", "base_model_name_or_path": "",
}  # fmt: skip
# Settings of PEFT's LoraConfig that say nothing about the adapter's arithmetic.
_WITHOUT_EFFECT = {
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip


class LoraConfig(Settings):
    """Settings of one LoRA adapter (Hu et al. 2021, arXiv:2106.09685), with PEFT's field names and meanings.

    The update of a layer is `scaling * B @ A` with scaling = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`
    (Kalajdzievski 2023, arXiv:2312.03732).

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range, or settings that do not go together.
    """

    other_names = _OTHER_NAMES

    r: int = Field(8, ge=1, description="rank of the update")
    lora_alpha: float = Field(8, gt=0, description="scaling is lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input while training")
    target_modules: list[str] | str = Field(
        "all-linear",
        description="name suffixes of linear layers, embeddings, convolutions; one string is a regular expression on "
        "the whole name; 'all-linear' is every linear layer but the output head; [] is none",
    )
    exclude_modules: list[str] | str | None = Field(
        None, description="names to leave out of target_modules, in the same syntax"
    )
    layers_to_transform: list[int] | int | None = Field(None, description="only these layer numbers")
    layers_pattern: list[str] | str | None = Field(
        None, description="with layers_to_transform: name of the list of layers, such as 'layers'"
    )
    target_parameters: list[str] | None = Field(
        None, description="name suffixes of parameters, such as 'experts.gate_up_proj': an update for each expert"
    )
    trainable_token_indices: list[Token] | dict[str, list[Token]] | None = Field(
        None, description="tokens with trained rows in the input embedding, or name of an embedding -> tokens"
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="name or regular expression -> rank, for layers whose rank is not r"
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="name or regular expression -> alpha, for layers where it is not lora_alpha"
    )
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r)")
    init_lora_weights: bool | str = Field(
        True,
        description="true: A Kaiming-uniform and B zero; false: B random too; or the name of another start: "
        + ", ".join(f"'{name}'" for name in start_names() if name not in ("true", "false")),
    )
    use_dora: bool = Field(False, description="weight-decomposed LoRA: train the length of each weight row separately")
    lora_bias: bool = Field(False, description="give B a bias")
    variant: str = Field(
        "plain",
        description="how the update enters a layer, for variants without a switch in PEFT's LoraConfig: "
        + ", ".join(f"'{one.name}'" for one in VARIANTS.values() if not one.switch and not one.is_of_starts),
    )
    modules_to_save: list[str] | None = Field(None, description="names of modules to train and save as full copies")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="biases to train as copies: none, those of all modules, or those of the adapted layers"
    )
    ensure_weight_tying: bool | None = Field(
        None, description="whether a copy of a tied embedding is tied to the head; required if there is such a copy"
    )

    task_type: Task | Literal["auto"] | None = Field(
        "auto", description="PEFT's name of the model's task, for the file; 'auto': that of the model's class"
    )

    @field_validator("init_lora_weights")
    @classmethod
    def _known_init(cls, value: bool | str) -> bool | str:
        return find_start(value).name

    @field_validator("variant")
    @classmethod
    def _known_variant(cls, value: str) -> str:
        variant, known = VARIANTS.get(value), [name for name, one in VARIANTS.items() if not one.is_of_starts]
        if variant is None or variant.is_of_starts:
            raise ValueError(f"'{value}' is not a variant{did_you_mean(value, known)}; known are {', '.join(known)}")
        if variant.switch:
            raise ValueError(f"PEFT has a setting of its own for '{value}': {variant.switch}=true")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        chosen = self._chosen_variants()
        if len(set(chosen.values())) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")
        if self.target_parameters and (self.update_variant.name != "plain" or self.lora_dropout):
            raise ValueError("target_parameters takes plain LoRA without dropout")
        return self

    def peft_values(self) -> dict[str, Any]:
        """Return the settings as JSON values under PEFT's keys; it has no `variant`, which plain LoRA does not need."""
        values = self.model_dump(mode="json", exclude={"variant"} if self.variant == "plain" else None)
        return values | {"task_type": None if self.task_type == "auto" else self.task_type}

    def _chosen_variants(self) -> dict[str, Variant]:
        """Return the variants chosen besides plain LoRA, setting that chooses it -> variant."""
        chosen = {one.setting: one for one in VARIANTS.values() if one.switch and getattr(self, one.switch)}
        if self.variant != "plain":
            chosen[f"variant '{self.variant}'"] = VARIANTS[self.variant]
        if self.start.in_base:
            chosen[f"a start inside the base weight ('{self.start.name}')"] = VARIANTS["residual"]
        return chosen

    @property
    def start(self) -> Start:
        """The start of A and B: the entry of `lorakit.adapters.starts.STARTS` that `init_lora_weights` names."""
        return find_start(self.init_lora_weights)

    @property
    def update_variant(self) -> Variant:
        """How the update enters a layer: chosen by a switch of PEFT's, by `variant`, or by the start."""
        return next(iter(self._chosen_variants().values()), VARIANTS["plain"])

    def scaling(self, rank: int, alpha: float) -> float:
        """Return the factor on B @ A for a layer of this rank and alpha."""
        return alpha / rank**0.5 if self.use_rslora else alpha / rank


def as_config(value: Any, paths: Collection[str]) -> LoraConfig:
    """Return a LoraConfig as it is, and that of PEFT with its fields taken over.

    Args:
        paths: of the model's modules. PEFT saves the heads of some tasks in full, and it finds the modules to save by
            the end of their paths.

    Raises:
        AdapterError: it is neither, or PEFT's config has settings that lorakit does not have.
        ConfigError: a value is not valid here.
    """
    if isinstance(value, LoraConfig):
        return value
    to_dict: Any = getattr(value, "to_dict", None)
    if not hasattr(value, "peft_type") or not callable(to_dict):
        hint = ": write LoraConfig(**values)" if isinstance(value, dict) else ""
        raise AdapterError(
            f"expected a lorakit.LoraConfig, or a LoraConfig of PEFT, got a {type(value).__name__}{hint}"
        )
    values, defaults = to_dict(), type(value)().to_dict()
    if (kind := str(getattr(values["peft_type"], "value", values["peft_type"]))) != "LORA":
        raise AdapterError(f"PEFT's {type(value).__name__} is of the kind {kind}; lorakit has LoRA: use a LoraConfig")
    taken = {key: values[key] for key in LoraConfig.model_fields if values.get(key) is not None}
    others = values.keys() - taken.keys() - _WITHOUT_EFFECT
    if used := sorted(key for key in others if values[key] != defaults.get(key)):
        raise AdapterError(f"PEFT's LoraConfig sets {', '.join(used)}, which lorakit does not have")
    if "target_modules" not in taken:
        if not values.get("target_parameters") and not values.get("trainable_token_indices"):
            raise AdapterError(
                "PEFT's LoraConfig names no target_modules, and PEFT would look them up by the model's type; name "
                "them, or say 'all-linear'"
            )
        taken["target_modules"] = []
    taken = {key: sorted(one) if isinstance(one, set | frozenset) else one for key, one in taken.items()}
    if "task_type" in taken:
        task = taken["task_type"] = str(getattr(taken["task_type"], "value", taken["task_type"]))
        heads = [name for name in TASK_HEADS.get(task, ()) if any(path.rpartition(".")[2] == name for path in paths)]
        if heads:
            taken["modules_to_save"] = list(dict.fromkeys([*taken.get("modules_to_save", ()), *heads]))
    if "modules_to_save" in taken:
        taken["modules_to_save"] = [*taken["modules_to_save"], *loosely_saved(taken["modules_to_save"], paths)]
    return LoraConfig(**taken)


def loosely_saved(names: Collection[str], paths: Collection[str]) -> list[str]:
    """Return the paths that end with a name of modules_to_save within their last name, as "q_norm" does with "norm".

    PEFT saves these modules too; lorakit takes only those that are called so.
    """
    return [
        path for path in paths if any(path.endswith(name) and not f".{path}".endswith(f".{name}") for name in names)
    ]
