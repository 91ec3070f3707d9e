"""`AdamW8bit`: AdamW with its moments in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, ClassVar

import lorakit_kernels as kernels
import torch
from lorakit_kernels import STATE_BLOCK_SIZE, AdamWStep, Moment8bit
from torch import Tensor

from ...quantization import dynamic_map
from .base import Optimizer

SMALLEST_8BIT = 4096  # elements; smaller tensors keep fp32 moments: they cost little and are the most sensitive


class AdamW8bit(Optimizer):
    """AdamW (arXiv:1711.05101) with moments in 8 bits (Dettmers et al. 2021, arXiv:2110.02861, section 2).

    The first moment is stored in the signed dynamic map, the second in the unsigned one, in blocks of 256 elements with
    an fp32 scale each: 2.03 bytes a parameter where AdamW's two fp32 moments take 8. Codes are the exact nearest, so an
    element without gradient does not move. There is one exception: a positive second moment never becomes zero. A
    tensor of fewer than `SMALLEST_8BIT` elements keeps fp32 moments.

    Args:
        params: fp32, bf16 or fp16 parameters, or groups of them.
        lr, betas, eps, weight_decay: as for torch.optim.AdamW, with its defaults; a group may have its own.

    State of a parameter: step () fp32; exp_avg and exp_avg_sq, either fp32 of its shape, or uint8 codes (numel,) with
    exp_avg_absmax and exp_avg_sq_absmax, (blocks,) fp32.

    Raises:
        TrainingError: a value is out of range.
    """

    summary: ClassVar[str] = "AdamW with its moments in 8 bits, 2 bytes a trained parameter"
    settings: ClassVar[tuple[str, ...]] = ("betas", "eps", "weight_decay")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        self._check(lr, betas, weight_decay, eps)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _take_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for parameter in parameters:
            state, gradient = self._state(parameter), parameter.grad
            assert gradient is not None
            state["step"] += 1
            step = AdamWStep(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], int(state["step"]))
            if "exp_avg_absmax" not in state:
                kernels.adamw(parameter, gradient, state["exp_avg"], state["exp_avg_sq"], step)
                continue
            first, second = (
                Moment8bit(state[key], state[f"{key}_absmax"], *_dynamic_map(parameter.device, signed))
                for key, signed in (("exp_avg", True), ("exp_avg_sq", False))
            )
            kernels.adamw_8bit(parameter, gradient, first, second, step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states of `state_dict` in their own dtypes; torch would cast them to the parameter's."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                device = value.device if key == "step" else parameter.device
                self.state[parameter][key] = value.to(device, copy=True)

    @staticmethod
    def state_bytes(size: int) -> dict[str, int]:
        """Return the step count and the two moments, in 8 bits with their scales or in fp32: name -> bytes."""
        if size < SMALLEST_8BIT:
            return {"step": 4, "exp_avg": 4 * size, "exp_avg_sq": 4 * size}
        scales = 4 * -(-size // STATE_BLOCK_SIZE)
        codes = {"exp_avg": size, "exp_avg_sq": size}
        return {"step": 4, **codes, "exp_avg_absmax": scales, "exp_avg_sq_absmax": scales}

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq"):
                if parameter.numel() < SMALLEST_8BIT:
                    state[name] = torch.zeros_like(parameter, dtype=torch.float32)
                    continue
                zero = _dynamic_map(parameter.device, signed=name == "exp_avg")[1].lt(0).sum()
                blocks = -(-parameter.numel() // STATE_BLOCK_SIZE)
                state[name] = zero.to(torch.uint8).repeat(parameter.numel())
                state[f"{name}_absmax"] = torch.zeros(blocks, device=parameter.device)
        return state


@cache
def _dynamic_map(device: torch.device, signed: bool) -> tuple[Tensor, Tensor]:
    """Return values and boundaries of the dynamic map on a device, for the first moment (signed) or the second.

    The second moment's first boundary is zero itself, so a positive second moment never becomes zero. With the nearest
    code it would, where the first moment of the same gradient does not. m / (0 + eps) then takes a step of 5,000 times
    the learning rate (60 steps, 65,536 elements with gradients of lognormal scale, σ = 2). With this boundary the
    largest step is 1.7 times the learning rate.
    """
    table = dynamic_map(signed)
    boundaries = table.boundaries.clone()
    if not signed:
        boundaries[0] = 0
    return table.values.to(device), boundaries.to(device)
