"""LoRA-FA: train B alone, A stays as it was drawn (Zhang et al. 2023, arXiv:2308.03303, eq. 4).

    W + s B A₀,   dB = s dyᵀ (x A₀ᵀ)

A layer then keeps x A₀ᵀ (tokens, r) for its backward pass and not x (tokens, in), and half of the adapter needs neither
gradient nor the optimizer's moments. PEFT has it as an optimizer, `create_lorafa_optimizer`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ..errors import TrainingError


@contextlib.contextmanager
def frozen_a(model: nn.Module, is_wanted: bool) -> Iterator[None]:
    """Within the context no lora_A is trained, if that is wanted.

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
