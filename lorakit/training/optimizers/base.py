"""`Optimizer`, the base class of lorakit's optimizers: torch's class without the compiler, plus facts about each one.

A new optimizer is one file with a class derived from `Optimizer`, and one line in the table `OPTIMIZERS`. A run's
settings, the recipe's reference, checkpoints and the planner read the rest from the class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import TrainingError


class Optimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer that does not import torch.compile.

    torch wraps the methods below to keep them out of compiled graphs, and the first call of a wrapper imports the
    compiler. That takes 142 MiB of memory and 2 s, even if nothing is compiled. The class takes them out of their
    wrappers.

    Attributes:
        summary: a description in a few words, for the recipe's reference.
        settings: the settings of `TrainConfig`, besides lr, that the constructor takes. Its defaults replace a setting
            that is None in `TrainConfig`.
        frugal: name of the optimizer that the planner suggests instead of this one to save memory.
    """

    summary: ClassVar[str]
    settings: ClassVar[tuple[str, ...]]
    frugal: ClassVar[str | None] = None

    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]
    load_state_dict = torch.optim.Optimizer.load_state_dict.__wrapped__  # type: ignore[attr-defined]
    state_dict = torch.optim.Optimizer.state_dict.__wrapped__  # type: ignore[attr-defined]
    zero_grad = torch.optim.Optimizer.zero_grad.__wrapped__  # type: ignore[attr-defined]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; return the loss of `closure`, which computes it again, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._take_step([parameter for parameter in group["params"] if parameter.grad is not None], group)
        return loss

    @staticmethod
    def state_bytes(size: int) -> dict[str, int]:
        """Return the state tensors that a parameter of `size` elements has after its first step: name -> bytes."""
        raise NotImplementedError

    @staticmethod
    def step_bytes(size: int) -> int:
        """Return the bytes that the update of a parameter of `size` elements allocates temporarily."""
        return 0

    def _check(self, lr: float, betas: tuple[float, float], weight_decay: float, eps: float = 1.0) -> None:
        """Raise TrainingError if a setting is out of range; the step itself would not notice."""
        if not (lr >= 0 and eps > 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise TrainingError(
                f"{type(self).__name__} needs lr >= 0, betas in [0, 1), eps > 0 and weight_decay >= 0; "
                f"got lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}"
            )

    def _take_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update the parameters of a group; each has a gradient."""
        raise NotImplementedError
