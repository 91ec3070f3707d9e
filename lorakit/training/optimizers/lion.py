"""`Lion`: steps of equal size, in the direction of a momentum's sign, with half of AdamW's state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Optimizer


class Lion(Optimizer):
    """Lion (Chen et al. 2023, arXiv:2302.06675, program 1), with an fp32 momentum m: 4 bytes a parameter.

        parameter -= lr * (sign(beta1 * m + (1 - beta1) * g) + weight_decay * parameter)
        m = beta2 * m + (1 - beta2) * g

    Every element moves by lr, however small its gradient, so the paper takes lr 3 to 10 times smaller than for AdamW.

    Args:
        params: fp32, bf16 or fp16 parameters, or groups of them.
        lr, betas, weight_decay: with the paper's defaults; a group may have its own.

    State of a parameter: exp_avg, the momentum, fp32 of its shape.

    Raises:
        TrainingError: a value is out of range.
    """

    summary: ClassVar[str] = (
        "one momentum in fp32, 4 bytes a trained parameter; needs a 3 to 10 times smaller lr; default betas [0.9, 0.99]"
    )
    settings: ClassVar[tuple[str, ...]] = ("betas", "weight_decay")
    frugal: ClassVar[str | None] = "adamw_8bit"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        self._check(lr, betas, weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @staticmethod
    def state_bytes(size: int) -> dict[str, int]:
        """Return the momentum: name -> bytes."""
        return {"exp_avg": 4 * size}

    @staticmethod
    def step_bytes(size: int) -> int:
        """Return the bytes of the fp32 direction."""
        return 4 * size

    def _take_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            self._update(parameter, parameter.grad.float(), group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
        momentum = state["exp_avg"]
        direction = torch.lerp(gradient, momentum, beta1).sign_()
        wide = parameter.float()  # the parameter itself if it is fp32
        wide.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
        if wide is not parameter:
            parameter.copy_(wide)
        momentum.lerp_(gradient, 1 - beta2)
