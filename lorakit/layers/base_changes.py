"""`ForgetsBase`: a module that drops what it computed from its base weight when PyTorch changes that weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

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
