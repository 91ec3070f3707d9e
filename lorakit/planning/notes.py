"""The memory that a plan leaves out, one sentence each."""

from __future__ import annotations

from ..adapters import LoraConfig
from ..sizes import format_size
from ..training import TrainConfig
from .adapter_size import FP32
from .shape import ModelShape


def notes(lora: LoraConfig, train: TrainConfig, shape: ModelShape) -> tuple[str, ...]:
    """Return what the numbers of a plan with these settings do not include."""
    left_out, start = [], lora.start
    adapted = [linear for linear in shape.linears if linear.adapter.rank]
    if start.decomposes_weight and adapted:
        widest = format_size(FP32 * max(linear.elements for linear in adapted))
        left_out.append(f"'{start.name}' decomposes each weight in fp32 before the first step, in a few times {widest}")
    if sums := sum(start.summed_elements(linear.in_features, linear.out_features) for linear in adapted):
        left_out.append(f"'{start.name}' holds sums over all layers, {format_size(FP32 * sums)}, before the first step")
    if train.offload_activations:
        left_out.append("the host memory of offload_activations; on the GPU, one layer's activations count at a time")
    if train.compile:
        left_out.append("torch.compile's own memory, a few hundred MiB, and its changes to the kept activations")
    return tuple(left_out)
