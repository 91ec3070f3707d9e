"""`TrainConfig.compile`: pass a decoder's layers through torch.compile during training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ..errors import TrainingError
from ..models.decoder.compiled import check_compiler
from ..models.decoder.decoder import Decoder, DecoderLayer


@contextlib.contextmanager
def compiled_layers(model: nn.Module, is_wanted: bool) -> Iterator[None]:
    """Within the context, compile a decoder's layers at their first call, if `is_wanted`.

    Raises:
        TrainingError: the model is not a `Decoder`.
        ConfigError: there is no compiler for the model's device.
    """
    if not is_wanted:
        yield
        return
    if not isinstance(model, Decoder):
        raise TrainingError(f"compile knows the layers of a Decoder; call torch.compile on a {type(model).__name__}")
    check_compiler(model.device)
    layers = [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)]
    for layer in layers:
        layer.is_compiled = True
    try:
        yield
    finally:
        for layer in layers:
            layer.is_compiled = False
