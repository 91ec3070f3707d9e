"""`Probes`: measure an adapter while it trains, and write the figures to probes.jsonl in the run's folder.

    lk.train(model, tok, records, config, probes=[Probes()])
    read_probes(config.output).table()

The figures, by module: norms of A, B, gradients and updates (`matrices`), gradient noise scale (`noise`), drift of
activations from the base (`drift`), losses by position and conversation (`token_losses`), and here the singular values
of each update and the alarm for layers that do not learn.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...data import Batch, Example
from ...errors import ConfigError
from ...sums import norms
from ...training import TrainingProbe
from ..measure.spectrum import effective_rank
from .config import ProbeConfig
from .dead import DeadLayers
from .drift import ActivationDrift, probe_rows
from .log import FILE, Header, ProbeFile, ProbeLog
from .matrices import Adapted, Movement, trained_adapted
from .noise import WINDOW, GradientNoise, NoiseEstimate
from .tensorboard import TensorBoard
from .token_losses import TokenLosses


class Probes(TrainingProbe):
    """Measures the adapters that a run trains, in a small part of its time, without changing a bit of its result.

    It takes the memory of a copy of the adapter and of the outputs of all adapted layers on the drift's rows.

    Args:
        config: what to measure, and how often.
        say: receives a line for each alarm; None: alarms are only in the file.

    Raises:
        ConfigError: a package that the config asks for is not installed.
    """

    def __init__(self, config: ProbeConfig | None = None, say: Callable[[str], None] | None = None) -> None:
        self.config, self._say = config or ProbeConfig(), say
        for wanted, package in ((self.config.parquet, "pyarrow"), (self.config.tensorboard, "tensorboard")):
            if wanted and importlib.util.find_spec(package) is None:
                raise ConfigError(f"the probes' {package} is not installed: pip install 'lorakit[probes]'")
        self._is_measuring, self._step = False, 0
        self._row: dict[str, Any] = {}
        self._losses = TokenLosses()
        self._file: ProbeFile | None = None
        self._noise: GradientNoise | None = None
        self._board: TensorBoard | None = None

    @property
    def log(self) -> ProbeLog:
        """The figures so far.

        Raises:
            ConfigError: the probes have not watched a run yet.
        """
        if self._file is None:
            raise ConfigError("these probes have not watched a run yet; pass them to train(..., probes=[...])")
        return self._file.log()

    def begin(
        self, model: nn.Module, examples: Sequence[Example], held_out: Sequence[Example], output: Path | None, done: int
    ) -> None:
        config = self.config
        self._adapted = trained_adapted(model)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        header = Header(
            [one.name for one in self._adapted], [one.rank for one in self._adapted], _base_norms(self._adapted),
            config.model_dump(),
        )  # fmt: skip
        self._output = output
        self._file = ProbeFile(output and output / FILE, header, done)
        kept = self._file.kept
        if config.tensorboard and output:
            self._board = TensorBoard(output / "tensorboard", done)
        earlier = [NoiseEstimate(**row["noise"]) for row in kept if row.get("noise")]
        self._noise = GradientNoise(self._parameters, earlier[-WINDOW:])
        self._dead = DeadLayers(header.layers, config.dead_after, kept)
        self._movement = Movement([*self._matrices("lora_a"), *self._matrices("lora_b")])
        self._drift: ActivationDrift | None = None
        if config.drift_every:
            rows = probe_rows(held_out or examples, config.drift_rows, config.drift_length)
            self._drift = ActivationDrift(model, [one.layer for one in self._adapted], rows)

    def before_step(self, step: int) -> None:
        self._step = step
        config = self.config
        rarely = (config.noise_every, config.spectra_every, config.drift_every)
        self._is_measuring = any(map(self._is_due, (config.every, *rarely)))
        self._losses = TokenLosses()
        if self._noise is not None and self._is_due(config.noise_every):
            self._noise.start()

    def after_micro_batch(self, examples: Sequence[Example], batch: Batch, losses: Tensor) -> None:
        if self._is_measuring:
            self._losses.add(examples, batch, losses)
        if self._noise is not None and self._is_due(self.config.noise_every):
            self._noise.micro_batch(len(losses))

    def before_update(self) -> None:
        if not self._is_measuring:
            return
        gradients = {id(p): p.grad for p in self._parameters if p.grad is not None}
        gradient_norms = dict(zip(gradients, norms(list(gradients.values())), strict=True))
        self._row = {"step": self._step}
        for key, which in (("grad_A", "lora_a"), ("grad_B", "lora_b")):
            self._row[key] = [gradient_norms.get(id(matrix), 0.0) for matrix in self._matrices(which)]
        if self._noise is not None and self._is_due(self.config.noise_every):
            self._row |= self._noise.finish(sum(norm**2 for norm in gradient_norms.values()))
        self._movement.remember()

    def after_update(self) -> None:
        if not self._is_measuring:
            return
        count = len(self._adapted)
        moved, sizes = self._movement.norms(), norms([*self._matrices("lora_a"), *self._matrices("lora_b")])
        self._row |= {"norm_A": sizes[:count], "norm_B": sizes[count:]}
        self._row |= {"update_A": moved[:count], "update_B": moved[count:]}

    def after_step(self, row: dict[str, Any]) -> None:
        if not self._is_measuring or self._file is None:
            return
        if self._is_due(self.config.spectra_every):
            values = [one.singular_values() for one in self._adapted]
            self._row["delta_norm"] = [float(s.norm()) for s in values]
            self._row["effective_rank"] = [effective_rank(s) for s in values]
        if self._drift is not None and self._is_due(self.config.drift_every):
            self._row |= self._drift.measure()
        self._row |= self._losses.figures()
        if alarms := self._dead.look(self._row):
            self._row["alarms"] = alarms
            for alarm in alarms if self._say else ():
                assert self._say is not None
                self._say(f"step {self._step}: {alarm['what']}: {', '.join(alarm['layers'])}")
        self._file.write(self._row)
        if self._board is not None:
            self._board.write(self._row, row)

    def end(self) -> None:
        if self._noise is not None:
            self._noise.end()
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            self._file.close()
            if self.config.parquet and self._output:
                self.log.write_parquet(self._output / "probes.parquet")
        self._noise = self._board = self._drift = None

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self._step % every == 0

    def _matrices(self, which: str) -> list[Tensor]:
        return [getattr(one, which) for one in self._adapted]


def _base_norms(adapted: Sequence[Adapted]) -> list[float]:
    """Return ‖W‖ of each layer's base weight; only one weight is dense at a time."""
    by_layer: dict[nn.Module, float] = {}
    for one in adapted:
        if one.layer not in by_layer:
            by_layer[one.layer] = one.base_norm()
    return [by_layer[one.layer] for one in adapted]
