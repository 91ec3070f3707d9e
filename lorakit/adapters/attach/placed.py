"""`Placement`: what an adapter is going to do to one module, known before the model changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...layers import VARIANTS, AdapterModule, Variant

Attach = Callable[[str, torch.dtype], None]


@dataclass(frozen=True)
class Placement:
    """The plan for one module that an adapter adapts.

    Attributes:
        path: of the module in the model.
        module: the module that will hold the adapter there: one that already holds other adapters, or a new one that
            is not in the model yet.
        shapes: of the adapter's trained parameters there, table or parameter name -> shape.
        attach: adds the adapter to `module`: attach(name, dtype).
        variant: how the update enters the layer.
        buffers: of a copy, such as running statistics, name -> the base's; an adapter's file holds them too.
        tied: name of a parameter here -> path of the module that trains it, and its name there; an adapter's file may
            hold it under each name.
        follows: path of the module that trains what this module shares with it; "" if this one is trained itself.
    """

    path: str
    module: AdapterModule
    shapes: dict[str, tuple[int, ...]]
    attach: Attach
    variant: Variant = VARIANTS["plain"]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    tied: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    follows: str = ""
