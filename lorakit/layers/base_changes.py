"""Base classes of modules around a frozen one: dropping what was computed from its weight, and counting the modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

from torch import Tensor, nn


class ForgetsBase(nn.Module):
    """Base class of modules that may keep values computed from the weight of a module inside them."""

    def forget_base(self) -> None:
        """Drop everything that was computed from the base weight, for instance before it is replaced."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.forget_base()  # `.to(torch.bfloat16)` rounds the base weight
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget_base()  # `load_state_dict` calls this before it overwrites the base weight
        super()._load_from_state_dict(*args)


class Counted(nn.Module):
    """Base class of modules that lists of a model's modules have to take in.

    Attributes:
        made: how many were made or copied so far, in all models. While it stays the same, such a list stays right.
    """

    made: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        Counted.made += 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        Counted.made += 1  # by copy.deepcopy, for instance
