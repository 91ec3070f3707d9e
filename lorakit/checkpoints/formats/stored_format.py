"""`StoredFormat`: a way in which a checkpoint folder stores weights that are already quantized."""

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
    """A quantized weight of a checkpoint. Its tensors were checked against each other but not read.

    Attributes:
        parts: names of its tensors in the file; the first holds the packed bytes.
        shape: the weight's.
        format: how it is quantized.
        assemble: builds the weight from its tensors, name in the file -> tensor, all on one device. It raises
            CheckpointError, naming the tensor, if one holds inf or nan or does not fit the others.
    """

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    format: WeightFormat
    assemble: Callable[[Mapping[str, Tensor]], QuantizedWeight]


class StoredFormat(ABC):
    """A format: how a folder in it is recognized, checked and read, and how a quantized weight is written in it.

    Attributes:
        method: "quant_method" in config.json's quantization_config.
        description: what lorakit can read of it, for error messages.
        method_is_optional: whether a quantization_config without a method means this format.
    """

    method: ClassVar[str]
    description: ClassVar[str]
    method_is_optional: ClassVar[bool] = False

    # ---- reading ----

    @abstractmethod
    def declares(self, section: Mapping[str, Any]) -> bool:
        """Return whether a quantization_config with this method promises quantized weights."""

    def refusal(self, section: Mapping[str, Any]) -> str | None:
        """Return why a quantization_config with this method cannot be loaded, or None if it can."""
        return None

    @abstractmethod
    def find(self, checkpoint: Checkpoint) -> dict[str, StoredWeight]:
        """Return the weights in this format, name -> stored weight, found by the names of their tensors.

        Only headers and the tensors that describe others are read.

        Raises:
            CheckpointError: naming file and tensor: one is missing, or has a wrong dtype or size.
        """

    # ---- writing ----

    @abstractmethod
    def tensors(self, name: str, weight: QuantizedWeight, storage_dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors to write for a weight (out, in): name in the file -> tensor.

        Args:
            storage_dtype: the dtype that the file gives for the packed bytes.
        """

    @abstractmethod
    def layouts(self, name: str, source: Layout, form: WeightFormat, storage_dtype: torch.dtype) -> dict[str, Layout]:
        """Return name -> (dtype, shape) of the tensors that `tensors` returns, each at its greatest length.

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
            formats: each tensor's format, None where it is not quantized.
            dense_layers: paths of the linear layers that are not quantized.
            values: the rest of config.json.
        """
