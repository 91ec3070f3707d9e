"""What `quantize_checkpoint` will write, worked out from the source's headers before a weight is read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.formats import BITSANDBYTES
from ..checkpoints.prequantized import find_stored
from ..checkpoints.shards import grouped
from ..checkpoints.stream import file_order
from ..errors import ConfigError
from ..quantization.bnb_format import Layout
from ..quantization.policy import QuantConfig, WeightFormat
from .load import check_tensors, empty_decoder, weight_formats

PLAN_VERSION = 1  # raise it when other bytes are written for the same plan


@dataclass(frozen=True)
class QuantizePlan:
    """What will be written.

    Attributes:
        checkpoint: the source.
        config: what is quantized, and how.
        formats: tensor name -> format, None for tensors that are copied.
        shards: file -> the source's tensors that go there, in the order in which they are read.
        dense_layers: paths of the linear layers that are not quantized.
    """

    checkpoint: Checkpoint
    config: QuantConfig
    formats: dict[str, WeightFormat | None]
    shards: dict[str, list[str]]
    dense_layers: list[str]

    @staticmethod
    def make(folder: Path, config: QuantConfig, shard_bytes: int) -> QuantizePlan:
        """Return the plan for a source folder; raises as `quantize_checkpoint` does."""
        checkpoint = Checkpoint(folder)
        if find_stored(checkpoint):
            raise ConfigError(f"{folder} is in 4 bits already; quantize the 16-bit model it was made from")
        model = empty_decoder(checkpoint)
        names = file_order(checkpoint, check_tensors(checkpoint, model, {}))
        formats = weight_formats(model, config, names)
        if not any(formats.values()):
            raise ConfigError("nothing would be quantized: quant_type is null, or all linear layers are skipped")
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        dense = [path for path in linear if formats.get(f"{path}.weight") is None]
        plan = QuantizePlan(checkpoint, config, formats, {}, dense)
        plan.shards.update(grouped({name: plan.written_bytes([name]) for name in names}, shard_bytes))
        return plan

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype in which packed bytes are stored."""
        dtype: torch.dtype = getattr(torch, self.config.storage_dtype)
        return dtype

    @property
    def digest(self) -> str:
        """A hash of the source (names, sizes and times of its files) and of every decision about the target."""
        files = {file: file.stat() for file in sorted({self.checkpoint.file(name) for name in self.formats})}
        sources = [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in files.items()]
        decisions: list[Any] = [PLAN_VERSION, sources, self.checkpoint.config(), self.config.model_dump(), self.shards]
        return hashlib.sha256(json.dumps(decisions).encode()).hexdigest()

    def source_bytes(self, names: Iterable[str]) -> int:
        """Return how many bytes these tensors take in the source."""
        return sum(entry.end - entry.start for entry in map(self.checkpoint.entry, names))

    def written_bytes(self, names: Iterable[str]) -> int:
        """Return how many bytes these tensors take in the target, or a few more."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.layouts(names).values())

    def layouts(self, names: Iterable[str]) -> dict[str, Layout]:
        """Return name -> (dtype, shape) of the tensors that these become; the JSON of states at its longest.

        Raises:
            ConfigError: a weight's packed bytes do not divide into elements of the storage dtype.
        """
        layouts: dict[str, Layout] = {}
        for name in names:
            entry, form = self.checkpoint.entry(name), self.formats[name]
            if form is None:
                layouts[name] = entry.dtype, entry.shape
                continue
            try:
                layouts |= BITSANDBYTES.layouts(name, (entry.dtype, entry.shape), form, self.storage_dtype)
            except ConfigError as error:
                raise ConfigError(f"{self.checkpoint.file(name)}: {error}") from None
        return layouts

    def misaligned(self) -> list[str]:
        """Return the quantized weights whose rows are not whole blocks."""
        forms = self.formats.items()
        return [name for name, form in forms if form and self.checkpoint.shape(name)[-1] % form.block_size]
