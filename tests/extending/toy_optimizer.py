"""An optimizer: descent by the sign of the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.training.optimizers import Optimizer


class SignDescent(Optimizer):
    """p -= lr * sign(g), with a weight decay of its own."""

    summary: ClassVar[str] = "steps by the sign alone"
    settings: ClassVar[tuple[str, ...]] = ("weight_decay",)

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @staticmethod
    def state_bytes(size: int) -> dict[str, int]:
        return {"signs": size}

    @staticmethod
    def step_bytes(size: int) -> int:
        return 3 * size

    def _take_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            self.state[parameter]["signs"] = parameter.grad.sign().to(torch.int8)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(self.state[parameter]["signs"], alpha=group["lr"])
