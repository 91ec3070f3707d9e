"""EVA: start A at the directions in which a layer's inputs vary most (Paischer et al. 2024, arXiv:2410.07170, eq. 3).

    X = U S Vᵀ for the inputs X (tokens, in) of a layer on examples of the task:   A = V[:, :r]ᵀ,   B = 0

V holds the eigenvectors of Xᵀ X, which is summed over the examples; no input is kept. Ranks stay as configured: they
are not redistributed among layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AdapterError
from ...layers import AdaptedLayer, LoRALinear
from .matrices import set_factors
from .start import Start, StartData


class EVA(Start):
    """A from the inputs of linear layers while the losses are computed; other layers keep the A and B they have."""

    name = "eva"
    needs = "losses"

    @torch.no_grad()
    def run(self, layers: Mapping[str, AdaptedLayer], name: str, data: StartData) -> None:
        """Set A of linear layers from their inputs.

        Raises:
            AdapterError: a layer saw fewer inputs than its rank.
        """
        linear = {path: layer for path, layer in layers.items() if isinstance(layer, LoRALinear)}
        moments: dict[str, Tensor] = {}
        tokens: dict[str, int] = dict.fromkeys(linear, 0)

        def watch(path: str) -> Any:
            def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
                moments[path] = x.T @ x + moments.get(path, 0)
                tokens[path] += len(x)

            return see

        hooks = [layer.register_forward_pre_hook(watch(path)) for path, layer in linear.items()]
        try:
            for _ in data.losses:
                pass
        finally:
            for hook in hooks:
                hook.remove()
        for path, layer in linear.items():
            rank = len(layer.lora_A[name])
            if tokens[path] < rank:
                raise AdapterError(
                    f"'eva' needs at least {rank} tokens for {path}, as many as its rank; saw {tokens[path]}"
                )
            vectors = torch.linalg.eigh(moments[path]).eigenvectors.flip(1)  # in order of falling eigenvalues
            set_factors(layer, name, vectors[:, :rank].T, torch.zeros_like(layer.lora_B[name]))

    def summed_elements(self, in_features: int, out_features: int) -> int:
        return in_features * in_features  # Xᵀ X
