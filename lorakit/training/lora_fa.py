"""LoRA-FA: train B alone and keep A as drawn (Zhang et al. 2023, arXiv:2308.03303, eq. 4).

    W + s B A₀,   dB = s dyᵀ (x A₀ᵀ)

A layer then keeps x A₀ᵀ (tokens, r) for its backward pass instead of x (tokens, in), and A needs neither gradient nor
optimizer moments. PEFT offers LoRA-FA as an optimizer, `create_lorafa_optimizer`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ..errors import TrainingError


@contextlib.contextmanager
def frozen_a(model: nn.Module, is_wanted: bool) -> Iterator[None]:
    """Within the context, freeze every lora_A, if `is_wanted`.

    Raises:
        TrainingError: it is wanted, but no lora_A is trained.
    """
    trained = [p for name, p in model.named_parameters() if "lora_A" in name.split(".") and p.requires_grad]
    if is_wanted and not trained:
        raise TrainingError("lora_fa freezes lora_A, but no lora_A is trained")
    if not is_wanted:
        trained = []
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
