"""`Setting`: everything that a plan depends on. Its method `plan` also plans the settings of suggestions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import torch

from ..adapters import LoraConfig
from ..models.decoder.config import DecoderConfig
from ..quantization.policy import QuantConfig
from ..training import TrainConfig
from .flops import step_flops
from .groups import MicroBatch
from .notes import notes
from .peak import Moment, Step, moments, optimizer_bytes
from .result import Plan
from .runtime import CPU_HEAP_GAPS, CPU_HEAP_LARGEST, CPU_HEAP_LIMIT
from .shape import ModelShape, model_shape


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that a plan depends on.

    Attributes:
        config: the decoder's configuration.
        lora, train, quant: settings.
        dtype: dtype of the unquantized weights and of the products.
        length: tokens of every sequence.
        device: "cpu" or "cuda".
        runtime_bytes: memory of a process, or of a GPU's context, without a model.
    """

    config: DecoderConfig
    lora: LoraConfig
    train: TrainConfig
    quant: QuantConfig
    dtype: torch.dtype
    length: int
    device: str
    runtime_bytes: int

    @cached_property
    def shape(self) -> ModelShape:
        """The shapes of the adapted model."""
        return model_shape(self.config, self.lora, self.quant, self.train.lora_fa)

    def with_train(self, train: TrainConfig) -> Setting:
        """Return the setting with other training settings and the same shapes."""
        other = replace(self, train=train)
        other.__dict__["shape"] = self.shape
        return other

    def plan(self) -> Plan:
        """Return the plan for this setting."""
        train, shape = self.train, self.shape
        sequences = min(train.batch_size, max(1, train.micro_batch_tokens // self.length))
        batch, step_batch = self._batch(sequences), self._batch(train.batch_size)
        micro_batches = math.ceil(train.batch_size / sequences)
        step = Step(train.checkpointing, micro_batches, train.optimizer, train.offload_activations)
        peak = max(moments(shape, batch, step), key=lambda moment: moment.total)
        parts = {
            "weights": shape.weight_bytes(self.dtype),
            "adapters": sum(size.nbytes for size in shape.adapter_sizes),
            "gradients": peak.gradients,
            "optimizer": 0 if train.offload_optimizer and not batch.on_cpu else optimizer_bytes(shape, train.optimizer),
            "activations": peak.activations,
            "workspace": peak.workspace,
            "logits": peak.logits,
            "runtime": self.runtime_bytes,
            "allocator": self._heap_waste(batch, peak) if batch.on_cpu else 0,
        }
        return Plan(
            parts=MappingProxyType(parts),
            moment=peak.name,
            flops=step_flops(shape, step_batch, train.checkpointing, micro_batches),
            parameters=shape.parameters,
            adapter_parameters=shape.adapter_parameters,
            trainable=sum(shape.trained),
            sequences=sequences,
            length=self.length,
            micro_batches=micro_batches,
            step_tokens=step_batch.tokens,
            device=self.device,
            notes=notes(self.lora, train, shape),
        )

    def _heap_waste(self, batch: MicroBatch, peak: Moment) -> int:
        """Return the bytes by which a CPU's heap outgrows its tensors, at most the size of these tensors."""
        widest = max(max(linear.in_features, linear.out_features) for linear in self.shape.linears)
        largest = min(batch.nbytes(widest), CPU_HEAP_LIMIT)
        return min(CPU_HEAP_GAPS + CPU_HEAP_LARGEST * largest, peak.activations + peak.workspace + peak.logits)

    def _batch(self, sequences: int) -> MicroBatch:
        trained = sequences * (self.length - 1)  # no token predicts the first one
        dropout = self.lora.lora_dropout > 0
        return MicroBatch(sequences, self.length, trained, self.dtype, dropout, self.device == "cpu")
