"""What a plan leaves out, in a sentence each."""

from __future__ import annotations

from ..adapters import LoraConfig
from ..sizes import format_size
from ..training import TrainConfig
from .adapter_size import FP32
from .shape import ModelShape


def notes(lora: LoraConfig, train: TrainConfig, shape: ModelShape) -> tuple[str, ...]:
    """Return what is not in the numbers of a plan with these settings."""
    found, start = [], lora.start
    adapted = [linear for linear in shape.linears if linear.adapter.rank]
    if start.decomposes_weight and adapted:
        widest = format_size(FP32 * max(linear.elements for linear in adapted))
        found.append(
            f"'{start.name}' decomposes each weight in fp32 before the first step, in some multiples of {widest}"
        )
    if sums := sum(start.summed_elements(linear.in_features, linear.out_features) for linear in adapted):
        found.append(f"'{start.name}' holds sums over all layers, {format_size(FP32 * sums)}, before the first step")
    if train.offload_activations:
        found.append("what offload_activations holds in host memory; a layer's at a time are counted on the GPU")
    if train.compile:
        found.append("what torch.compile takes for itself, some hundred MiB, and what it keeps otherwise than stated")
    return tuple(found)
