"""The 16-bit checkpoint that a model was quantized from: found again, and checked before anything is merged into it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ...checkpoints.checkpoint import Checkpoint
from ...errors import CheckpointError, LorakitError
from ...layers import AdaptedLayer
from ...layers.frozen.quantized_module import QuantizedModule
from ...models.pretrained import resolve_model
from ...quantization import QuantizedWeight
from ...quantization.weight import SOURCE_DTYPES
from ..peft.fingerprint import base_names
from .weights import quantized_like

Base = str | os.PathLike[str] | Literal[False] | None

# Of the codes that a layer and its base must share. A weight quantized from fp32 differs from one quantized from the
# same weights in bf16 in up to 1% of its codes; a fine-tune that changed the weights by 1% differs in about 3%.
_LEAST_AGREEMENT = 0.98


class WrongBase(CheckpointError):
    """A checkpoint does not hold the weights that a layer was made from."""


def open_base(model: nn.Module, base: Base) -> Checkpoint | None:
    """Open the checkpoint that was named, or the folder the model was loaded from; None where there is none.

    Raises:
        CheckpointError: the checkpoint that was named is missing or malformed.
    """
    if base is False:
        return None
    if base is not None:
        return Checkpoint(resolve_model(base))
    folder = loaded_from(model)
    try:
        return Checkpoint(folder) if folder is not None else None
    except LorakitError:  # it was moved or changed since, and nobody asked for it
        return None


def loaded_from(model: nn.Module) -> Path | None:
    """Return the folder that our or transformers' model remembers, if it is there."""
    return next((Path(name) for name in base_names(model) if name and Path(name).is_dir()), None)


def weight_from(checkpoint: Checkpoint, path: str, layer: AdaptedLayer) -> Tensor | None:
    """Read the weight of a layer from the checkpoint it was made from, to the layer's device.

    None for a dense layer that is not there under its name, as a tied output head: its own weight is as good.

    Raises:
        WrongBase: there is no such weight there, it is not in 16 or 32 bits or mis-shaped, or the layer was not made
            from it: its codes are others than quantizing gives or, where it is dense, its numbers are others.
    """
    name, module = f"{path}.weight", layer.base_layer
    where = f"{checkpoint.folder}: {name}"
    if name not in checkpoint and not isinstance(module, QuantizedModule):
        return None
    if name not in checkpoint:
        raise WrongBase(f"{where} is not in this checkpoint")
    if checkpoint.dtype(name) not in SOURCE_DTYPES:
        raise WrongBase(f"{where} is stored as {checkpoint.dtype(name)}; a merge needs 16 or 32 bits")
    own = module.quantized if isinstance(module, QuantizedModule) else cast(Tensor, module.weight)
    if checkpoint.shape(name) != own.shape:
        raise WrongBase(f"{where} has shape {checkpoint.shape(name)}, the layer has {tuple(own.shape)}")
    weight = checkpoint.read(name).to(next(module.parameters()).device)
    if isinstance(own, QuantizedWeight):
        agreement = float((quantized_like(weight, own).codes == own.codes).float().mean())
        if agreement < _LEAST_AGREEMENT:
            raise WrongBase(f"{where} is not what the layer was quantized from: {agreement:.1%} of the codes agree")
    elif not torch.equal(weight.to(own.dtype), own):
        raise WrongBase(f"{where} holds other numbers than the layer, which is not quantized")
    return weight
