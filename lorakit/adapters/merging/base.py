"""The 16-bit checkpoint from which a model was quantized: a merge finds it and checks it before using its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, cast

from torch import Tensor, nn

from ...checkpoints.checkpoint import Checkpoint
from ...errors import CheckpointError, LorakitError
from ...layers import AdaptedLayer
from ...layers.frozen.quantized_module import QuantizedModule
from ...models.pretrained import resolve_model
from ...quantization import QuantizedWeight
from ...quantization.weight import SOURCE_DTYPES
from ..peft.fingerprint import base_names
from ..peft.samples import same_values
from .weights import quantized_like

Base = str | os.PathLike[str] | Literal[False] | None

# Least share of codes in which a layer and its quantized base agree. Quantizing the same weights from fp32 and from
# bf16 gives up to 1% different codes; a fine-tune that changed the weights by 1% gives about 3%.
_LEAST_AGREEMENT = 0.98


class WrongBase(CheckpointError):
    """A checkpoint does not hold the weights from which a layer was made."""


def open_base(model: nn.Module, base: Base) -> Checkpoint | None:
    """Open the named checkpoint, or the folder that the model was loaded from; None if there is none.

    Raises:
        CheckpointError: the named checkpoint is missing or malformed.
    """
    if base is False:
        return None
    if base is not None:
        return Checkpoint(resolve_model(base))
    folder = loaded_from(model)
    try:
        return Checkpoint(folder) if folder is not None else None
    except LorakitError:  # it was moved or changed since loading, and the caller did not name it
        return None


def loaded_from(model: nn.Module) -> Path | None:
    """Return the folder that a model, lorakit's or one of transformers, remembers, if it still exists."""
    return next((Path(name) for name in base_names(model) if name and Path(name).is_dir()), None)


def weight_from(checkpoint: Checkpoint, path: str, layer: AdaptedLayer) -> Tensor | None:
    """Read a layer's weight from the checkpoint to the layer's device, in the shape that the layer has.

    The result is None for a dense layer whose name is not in the checkpoint, such as a tied output head: the layer's
    own weight serves as well.

    Raises:
        WrongBase: there is no such weight, it is not in 16 or 32 bits, its shape is wrong, or the layer was not made
            from it. A 4-bit layer must have the codes that quantizing the weight gives, a dense one its values.
    """
    name, module = f"{path}.weight", layer.base_layer
    where = f"{checkpoint.folder}: {name}"
    if name not in checkpoint and not isinstance(module, QuantizedModule):
        return None
    if name not in checkpoint:
        raise WrongBase(f"{where} is not in this checkpoint")
    if checkpoint.dtype(name) not in SOURCE_DTYPES:
        raise WrongBase(f"{where} is stored as {checkpoint.dtype(name)}; a merge needs 16 or 32 bits")
    current = module.quantized if isinstance(module, QuantizedModule) else cast(Tensor, module.weight)
    if checkpoint.shape(name) != current.shape:
        raise WrongBase(f"{where} has shape {checkpoint.shape(name)}, the layer has {tuple(current.shape)}")
    weight = checkpoint.read(name).to(next(module.parameters()).device)
    if isinstance(current, QuantizedWeight):
        agreement = float((quantized_like(weight, current).codes == current.codes).float().mean())
        if agreement < _LEAST_AGREEMENT:
            raise WrongBase(f"{where} is not what the layer was quantized from: {agreement:.1%} of the codes agree")
    elif not same_values(weight, current):
        raise WrongBase(f"{where} holds other numbers than the layer, which is not quantized")
    return weight
