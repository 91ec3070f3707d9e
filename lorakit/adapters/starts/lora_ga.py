"""LoRA-GA: start where the first step follows the full gradient (Wang et al. 2024, arXiv:2407.05000, theorem 3.1).

    G = dLoss/dW = U S Vᵀ:   A = γ' V[:, r:2r]ᵀ,   B = γ' U[:, :r],   γ' = out^(1/4) / √(s γ)

with the stable scale of the paper (eq. 10), γ = 16. B A is not zero; the variant `residual` subtracts the start again.
The gradient is the sum of dyᵀ x over the losses, from a layer's inputs x and its outputs' gradients dy. So the base may
be frozen or in 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AdapterError
from ...layers import AdaptedLayer, LoRALinear
from .matrices import set_factors
from .start import Start, StartData

_GAMMA = 16.0
_POWER_ITERATIONS = 4


class LoRAGA(Start):
    """A and B from the gradients of linear layers' weights over the losses; other layers keep the A and B they have."""

    name = "lora_ga"
    needs = "losses"
    in_base = True
    peft_changes_base = True

    def run(self, layers: Mapping[str, AdaptedLayer], name: str, data: StartData) -> None:
        """Set A and B of linear layers from the gradients of their weights.

        Raises:
            AdapterError: a layer got no gradient, or is too small for twice its rank.
        """
        linear = {path: layer for path, layer in layers.items() if isinstance(layer, LoRALinear)}
        gradients = _weight_gradients(linear, data.losses)
        with torch.no_grad():
            for path, layer in linear.items():
                if path not in gradients:
                    raise AdapterError(
                        f"'lora_ga' saw no gradient of {path}; are there losses, and do they depend on it?"
                    )
                _follow_gradient(path, layer, name, gradients[path])

    def summed_elements(self, in_features: int, out_features: int) -> int:
        return out_features * in_features  # dyᵀ x


def _weight_gradients(layers: Mapping[str, LoRALinear], losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return dLoss/dW summed over the losses, path -> (out_features, in_features) fp32."""
    gradients: dict[str, Tensor] = {}
    seen: list[tuple[str, Tensor, Tensor]] = []  # for one loss: path, x, y

    def watch(path: str) -> Any:
        def see(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            y = y if y.requires_grad else y.detach().requires_grad_()  # for the first layers of a frozen model
            seen.append((path, inputs[0].detach(), y))
            return y

        return see

    hooks = [layer.register_forward_hook(watch(path)) for path, layer in layers.items()]
    try:
        with torch.enable_grad():
            for loss in losses:
                dys = torch.autograd.grad(loss, [y for _, _, y in seen])  # not backward: nothing gets a .grad
                for (path, x, _), dy in zip(seen, dys, strict=True):
                    product = dy.flatten(0, -2).T.float() @ x.flatten(0, -2).float()
                    gradients[path] = product + gradients.get(path, 0)
                seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return gradients


def _follow_gradient(path: str, layer: LoRALinear, name: str, gradient: Tensor) -> None:
    rank = len(layer.lora_A[name])
    if 2 * rank > min(gradient.shape):
        raise AdapterError(f"'lora_ga' at rank {rank} needs {2 * rank} directions; {path} has {min(gradient.shape)}")
    u, _, v = torch.svd_lowrank(gradient, min(4 * rank, *gradient.shape), _POWER_ITERATIONS)
    size = layer.out_features**0.25 / (_GAMMA * layer.scaling[name]) ** 0.5
    set_factors(layer, name, size * v[:, rank : 2 * rank].T, size * u[:, :rank])
