"""What a training step keeps of the forward pass: everything, or less and computes it again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from ..errors import TrainingError
from ..models.decoder import Decoder


@contextlib.contextmanager
def saving_activations(model: nn.Module, checkpointing: Literal["none", "mlp", "layer"] | int) -> Iterator[None]:
    """Within the context, have the model's backward pass compute again what `checkpointing` names.

    Args:
        model: a `Decoder`, or a transformers model, of which every layer is checkpointed or none.
        checkpointing: see `Decoder.set_checkpointing`.

    Raises:
        TrainingError: the model does not offer this kind.
    """
    if checkpointing == "none":
        yield
    elif isinstance(model, Decoder):
        model.set_checkpointing(checkpointing)
        try:
            yield
        finally:
            model.set_checkpointing("none")
    elif checkpointing == "layer" and hasattr(model, "gradient_checkpointing_enable"):
        transformers_model: Any = model
        transformers_model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            transformers_model.gradient_checkpointing_disable()
    else:
        raise TrainingError(f"{type(model).__name__} does not offer checkpointing: {checkpointing}")
