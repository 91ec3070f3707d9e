"""The matrices that the probes measure: pairs of A and B, and how far a step moves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...adapters import lora_layers
from ...adapters.low_rank import LowRank
from ...layers.adapted import AdaptedLayer
from ...sums import norms


@dataclass(frozen=True, eq=False)
class Adapted:
    """One adapter's pair of matrices on one layer.

    Attributes:
        name: the layer's path; with several trained adapters, path:adapter.
        layer, adapter: where the pair is.
    """

    name: str
    layer: AdaptedLayer
    adapter: str

    @property
    def lora_a(self) -> Tensor:
        """A, (r, in_features)."""
        matrix: Tensor = self.layer.lora_A[self.adapter]
        return matrix

    @property
    def lora_b(self) -> Tensor:
        """B, (out_features, r)."""
        matrix: Tensor = self.layer.lora_B[self.adapter]
        return matrix

    @property
    def rank(self) -> int:
        """The allotted rank; for experts, that of all together."""
        return len(self.lora_a)

    def base_norm(self) -> float:
        """Return ‖W‖ of the base weight, summed in float64."""
        return float(torch.linalg.vector_norm(self.layer.base_weight(torch.float32), dtype=torch.float64))

    def singular_values(self) -> Tensor:
        """Return those of the low-rank update (scaling · B A for plain LoRA), (k,) float64; of all experts together."""
        up, down = (factor.detach().double() for factor in self.layer.factors(self.adapter))
        if up.ndim == 2:
            return LowRank(up, down).singular_values
        each = [LowRank(*pair).singular_values for pair in zip(up, down, strict=True)]
        return torch.cat(each).sort(descending=True).values


def trained_adapted(model: nn.Module) -> list[Adapted]:
    """Return the pairs whose A or B is trained, in model order."""
    pairs = [
        (path, layer, name)
        for path, layer in lora_layers(model).items()
        for name in layer.names()
        if layer.lora_A[name].requires_grad or layer.lora_B[name].requires_grad
    ]
    is_single = len({name for *_, name in pairs}) == 1
    return [Adapted(path if is_single else f"{path}:{name}", layer, name) for path, layer, name in pairs]


class Movement:
    """Measures how far a step moves tensors, against a copy from before it in buffers that are allocated once.

    Args:
        tensors: parameters of any shape; the buffers take as much memory as they do.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._before = [torch.empty_like(tensor) for tensor in self._tensors]

    def remember(self) -> None:
        """Take the copy."""
        torch._foreach_copy_(self._before, self._tensors)

    def norms(self) -> list[float]:
        """Return ‖now - then‖ of each tensor; this uses up the copy."""
        torch._foreach_sub_(self._before, self._tensors)  # in place: fresh memory takes four times as long
        return norms(self._before)
