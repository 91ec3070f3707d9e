"""`StoredFormat`: a way in which a checkpoint folder keeps weights that are quantized already."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...quantization import QuantizedWeight
from ...quantization.bnb_format import Layout
from ...quantization.policy import QuantConfig, WeightFormat
from ..checkpoint import Checkpoint


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight of a checkpoint, whose tensors were checked against each other but not read.

    Attributes:
        parts: names of its tensors in the file; the first is that of the packed bytes.
        shape: of the weight.
        format: how it is quantized.
        assemble: puts the weight together from its tensors, name in the file -> tensor, all on one device. It raises
            CheckpointError, naming the tensor, where one holds inf or nan or does not fit the others.
    """

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    format: WeightFormat
    assemble: Callable[[Mapping[str, Tensor]], QuantizedWeight]


class StoredFormat(ABC):
    """A format: how it is recognized, checked and read, and how a quantized weight is written in it.

    Attributes:
        method: "quant_method" in config.json's quantization_config.
        description: what can be read of it, for errors.
        method_is_optional: whether a quantization_config without a method is of this format.
    """

    method: ClassVar[str]
    description: ClassVar[str]
    method_is_optional: ClassVar[bool] = False

    # ---- reading ----

    @abstractmethod
    def declares(self, section: Mapping[str, Any]) -> bool:
        """Whether a quantization_config with this method promises quantized weights."""

    def refusal(self, section: Mapping[str, Any]) -> str | None:
        """Say why a quantization_config with this method cannot be loaded, or None where it can."""
        return None

    @abstractmethod
    def find(self, checkpoint: Checkpoint) -> dict[str, StoredWeight]:
        """Find the weights in this format, name -> what is stored, by the names of their tensors.

        Only headers are read, and tensors that describe others.

        Raises:
            CheckpointError: naming file and tensor: one is missing, or of a wrong dtype or size.
        """

    # ---- writing ----

    @abstractmethod
    def tensors(self, name: str, weight: QuantizedWeight, storage_dtype: torch.dtype) -> dict[str, Tensor]:
        """Return what is written for a weight (out, in), name in the file -> tensor.

        Args:
            storage_dtype: what the packed bytes are called in the file.
        """

    @abstractmethod
    def layouts(self, name: str, source: Layout, form: WeightFormat, storage_dtype: torch.dtype) -> dict[str, Layout]:
        """Return name -> (dtype, shape) of what `tensors` gives, each at its longest.

        Args:
            source: dtype and shape of the weight before it is quantized.

        Raises:
            ConfigError: the packed bytes do not divide into elements of the storage dtype.
        """

    @abstractmethod
    def config_section(
        self,
        config: QuantConfig,
        formats: Mapping[str, WeightFormat | None],
        dense_layers: Sequence[str],
        values: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return config.json's quantization_config for a folder.

        Args:
            config: what is quantized, and how.
            formats: what comes of it for each tensor.
            dense_layers: paths of the linear layers that are not quantized.
            values: the rest of config.json.
        """
