"""The runs of the study: the adapters that it trains, their ranks, and the files that it keeps.

A finished run has a folder with the adapter, the losses, and its layers' figures once they are read. None of them is
computed again. After a change to the measurements, delete the folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lorakit import (
    Decoder,
    LoraConfig,
    Record,
    TrainConfig,
    add_adapter,
    inspect_adapter,
    load_adapter,
    load_model,
    load_tokenizer,
    save_adapter,
    set_adapter,
    train,
)
from lorakit.evaluation import general_text
from lorakit.evaluation.perplexity import perplexity
from lorakit.files import read_json_object, write_text
from lorakit.inspection.interventions.studies import Metric, held_out_loss
from lorakit.models import Checkpoint, resolve_model

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODULES = {  # ways to spend the budget
    "q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "o": ("o_proj",), "q+v": ("q_proj", "v_proj"),
    "q+k+v+o": ALL[:4], "mlp": ALL[4:], "all-linear": ALL,
}  # fmt: skip
BUDGET_RANK = 8  # rank of all-linear; the other sets' ranks give nearly as many parameters
LR = 5e-4
RATES, RANKS = (1e-4, 5e-4, 2e-3, 1e-2), (1, 8, 64)
BATCH = 8
SCALING = 2.0  # lora_alpha / r, as in the paper on intruders; with it a higher rank also learns faster
ALPHA = SCALING * BUDGET_RANK  # for all ranks, as in the LoRA paper: all learn at about one speed


@dataclass(frozen=True)
class Run:
    """One adapter.

    Attributes:
        modules: a name in MODULES.
        alpha: lora_alpha; None: SCALING times the rank.
        times: length as a multiple of the normal length.
    """

    modules: str
    rank: int
    lr: float = LR
    seed: int = 0
    alpha: float | None = None
    times: int = 1

    @property
    def name(self) -> str:
        """Name of its folder."""
        alpha = "" if self.alpha is None else f"-alpha{self.alpha:g}"
        times = "" if self.times == 1 else f"-times{self.times}"
        return f"{self.modules}-r{self.rank}{alpha}-lr{self.lr:g}-seed{self.seed}{times}"

    def longer(self, times: int) -> Run:
        """Return the run that is `times` as long."""
        return replace(self, times=times)


@dataclass(frozen=True)
class Losses:
    """The outcome of a run.

    Attributes:
        parameters: number of trained parameters.
        held_out: nats a trained token of the held-out addresses.
        general: nats a token of lorakit's general text.
    """

    parameters: int
    held_out: float
    general: float


def module_shapes(model: str) -> dict[str, tuple[int, int]]:
    """Return the shape (out, in) of every adaptable layer of a checkpoint, from its header."""
    checkpoint = Checkpoint(resolve_model(model))
    names = [name.removesuffix(".weight") for name in checkpoint.names if name.endswith("_proj.weight")]
    return {name: (shape[0], shape[1]) for name in names for shape in [checkpoint.shape(f"{name}.weight")]}


def parameters_per_rank(shapes: Mapping[str, tuple[int, int]], modules: Sequence[str]) -> int:
    """Return the parameters of A and B that one rank takes on all modules of these kinds."""
    return sum(sum(shape) for name, shape in shapes.items() if name.rpartition(".")[2] in modules)


def equal_ranks(shapes: Mapping[str, tuple[int, int]], rank: int = BUDGET_RANK) -> dict[str, int]:
    """Return for each set of MODULES the rank at which it has nearly as many parameters as all-linear at `rank`."""
    budget = rank * parameters_per_rank(shapes, ALL)
    return {name: max(1, round(budget / parameters_per_rank(shapes, kinds))) for name, kinds in MODULES.items()}


def budget_runs(shapes: Mapping[str, tuple[int, int]], seed: int, alpha: float | None = None) -> list[Run]:
    """Return the runs of section 7.1 of the LoRA paper, one for each set of MODULES; `alpha` as of `Run`."""
    return [
        Run(name, rank, seed=seed, alpha=None if alpha == SCALING * rank else alpha)
        for name, rank in equal_ranks(shapes).items()
    ]


def grid_runs() -> list[Run]:
    """Return the runs of the intruder study."""
    return [Run("all-linear", rank, lr) for lr in RATES for rank in RANKS]


EIGHT = Run("all-linear", BUDGET_RANK)
WIDE = Run("all-linear", 64), Run("all-linear", 64, seed=1)  # of section 7.2
NARROW = Run("all-linear", 4)  # of section 7.3
TIMES = (1, 6)  # lengths of the runs of both sections


def all_runs(shapes: Mapping[str, tuple[int, int]], seeds: int) -> list[Run]:
    """Return every run of the study once."""
    runs = [run.longer(times) for times in TIMES for run in (EIGHT, *WIDE, NARROW)] + grid_runs()
    for seed in range(seeds):
        runs += budget_runs(shapes, seed, ALPHA) + budget_runs(shapes, seed)
    return list(dict.fromkeys(runs))


@dataclass(frozen=True)
class Lab:
    """The model, the records and the folder that all runs share.

    Attributes:
        model: a checkpoint folder or a known name; its weights stay in bf16.
        train, held_out: conversations.
        epochs: epochs of a run of normal length.
        folder: folder of finished runs.
    """

    model: str
    train: Sequence[Record]
    held_out: Sequence[Record]
    epochs: float
    folder: Path

    def adapter(self, run: Run) -> Path:
        """Return the folder of a run's adapter."""
        return self.folder / run.name / "adapter"

    @cached_property
    def metric(self) -> Metric:
        """The held-out loss."""
        return held_out_loss(load_tokenizer(self.model), self.held_out)

    def base_model(self) -> Decoder:
        """Load the model in bf16, as in the papers; an adapter on a quantized base would also repair its errors."""
        return load_model(self.model, quant_type=None)

    def finished(self, run: Run | None) -> Losses:
        """Return a run's losses, training it first if needed; without a run, the base model's."""
        file = self.folder / (run.name if run else "base") / "losses.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            model = self._trained(run) if run else self.base_model()
            count = sum(p.numel() for p in model.parameters() if p.requires_grad) if run else 0
            losses = {"parameters": count, "held_out": self._loss(model), "general": self._general_loss(model)}
            write_text(file, json.dumps(losses) + "\n")
        return Losses(**read_json_object(file))

    def inspected(self, run: Run) -> list[dict[str, Any]]:
        """Return a finished run's layers as rows of figures, measured against the base; they are kept in its folder."""
        file = self.folder / run.name / "layers.json"
        if not file.exists():
            self.finished(run)
            print(f"inspecting {run.name}", flush=True)
            write_text(file, json.dumps({"layers": inspect_adapter(self.adapter(run), base=self.model).table()}) + "\n")
        layers: list[dict[str, Any]] = read_json_object(file)["layers"]
        return layers

    def loaded(self, run: Run) -> Decoder:
        """Return the model with a finished run's adapter."""
        model = self.base_model()
        load_adapter(model, self.adapter(run))
        set_adapter(model, "default")
        return model

    def _trained(self, run: Run) -> Decoder:
        model = self.base_model()
        torch.manual_seed(1000 * run.seed + run.rank)  # runs of other ranks or seeds start from other rows
        config = LoraConfig(
            r=run.rank, lora_alpha=run.alpha or SCALING * run.rank, target_modules=list(MODULES[run.modules])
        )
        add_adapter(model, config)
        epochs = run.times * self.epochs
        settings = TrainConfig(lr=run.lr, batch_size=BATCH, epochs=epochs, seed=run.seed, progress=False)
        train(model, load_tokenizer(self.model), self.train, settings)
        save_adapter(model, self.adapter(run))
        return model

    @torch.no_grad()
    def _loss(self, model: Decoder) -> float:
        return float(self.metric(model))

    def _general_loss(self, model: Decoder) -> float:
        return math.log(perplexity(model, load_tokenizer(self.model), general_text()))
