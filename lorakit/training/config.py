"""`TrainConfig`: the settings of one training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from ..errors import did_you_mean
from ..settings import Settings
from .optimizers import OPTIMIZERS

Beta = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # the range that every generator takes


class TrainConfig(Settings):
    """How to train: optimizer, schedule, batches, evaluation and checkpoints.

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of range.
    """

    optimizer: str = Field(
        "adamw", description=". ".join(f"{name}: {kind.summary}" for name, kind in OPTIMIZERS.items())
    )
    offload_optimizer: bool = Field(
        False, description="on a GPU, keep the optimizer's moments in host memory; each visits the GPU for its update"
    )
    lr: float = Field(2e-4, gt=0, description="peak learning rate")
    loraplus_lr_ratio: float | None = Field(
        None, ge=1, description="LoRA+: learning rate of lora_B as a multiple of lr, such as 16; lora_A keeps lr"
    )
    lora_fa: bool = Field(
        False, description="LoRA-FA: train lora_B alone; saves the activations, gradients and moments of lora_A"
    )
    epochs: float = Field(1.0, gt=0, description="passes over the training records, when max_steps is not given")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    batch_size: int = Field(16, ge=1, description="conversations per optimizer step")
    micro_batch_tokens: int = Field(
        2048, ge=1, description="tokens per forward pass; a larger batch takes several, with the same result"
    )
    checkpointing: Literal["none", "mlp", "layer"] | Annotated[int, Field(ge=2)] = Field(
        "none",
        description="what the backward pass recomputes instead of keeping it: nothing, the MLPs, every layer, or "
        "with a number n every n-th layer; slower, in less memory, with the same result",
    )
    offload_activations: bool = Field(
        False,
        description="keep activations for the backward pass in host memory instead of the GPU's; with checkpointing, "
        "those that it keeps; an error on the CPU",
    )
    compile: bool = Field(
        False,
        description="pass the decoder's layers, except attention, through torch.compile, for GPUs; the first step "
        "takes 13 s longer, and later steps on the CPU take no less time; rounding and dropout's draws differ",
    )
    max_length: int = Field(1024, ge=2, description="longest conversation in tokens; a longer one is an error")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps over which lr rises from 0")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="lr at the end of the cosine, as a share of the peak")
    betas: tuple[Beta, Beta] | None = Field(
        None, description="decay rates of the optimizer's moments; null: its own, [0.9, 0.999] for AdamW"
    )
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this global norm")
    seed: Seed = Field(0, description="seed of the order of the data and of dropout")
    eval_every: int | None = Field(
        None, ge=1, description="steps between evaluations of the held-out loss; null: at the end only"
    )
    checkpoint_every: int | None = Field(None, ge=1, description="steps between checkpoints, for resuming; null: none")
    output: Path | None = Field(None, description="folder for train.jsonl and checkpoints; null: nothing is written")
    progress: bool = Field(True, description="show a progress bar")

    @field_validator("optimizer")
    @classmethod
    def _optimizer_exists(cls, name: str) -> str:
        if name not in OPTIMIZERS:
            raise ValueError(f"unknown '{name}'{did_you_mean(name, OPTIMIZERS)} (known: {', '.join(OPTIMIZERS)})")
        return name
