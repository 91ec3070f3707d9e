"""`load_model`: read a Hugging Face folder into a `Decoder`, tensor by tensor, quantizing on the way.

Besides the result, memory never holds more than one 16-bit tensor, or two bands of one (`stream`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.formats import StoredWeight
from ..checkpoints.prequantized import check_request, find_stored, stream_stored
from ..checkpoints.stream import stream_tensors
from ..checkpoints.tied_head import HEAD, TIED_KEY, is_head_tied
from ..errors import MOST_LISTED, CheckpointError, ConfigError, ShapeError, did_you_mean, listing
from ..layers import Linear4bit
from ..quantization import QuantizedWeight
from ..quantization.policy import QuantConfig, WeightFormat
from .decoder.config import DecoderConfig
from .decoder.decoder import Decoder
from .devices import check_device
from .pretrained import resolve_model

_DERIVED = ("rotary_emb.inv_freq",)  # buffers that old checkpoints carry and every implementation recomputes


def load_model(
    path: str | os.PathLike[str],
    quant_type: str | None = "nf4",
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    block_size: int = 64,
    double_quant: bool = True,
    *,
    quant_config: QuantConfig | None = None,
) -> Decoder:
    """Load a frozen decoder from a Hugging Face checkpoint folder.

    A folder that is in 4 bits already is loaded as it is, whatever its type and block size; with quant_type=None it is
    dequantized.

    Args:
        path: the folder, or the name of a known model such as "smollm2-135m-instruct".
        quant_type: 4-bit type of every linear layer but the output head; None: not quantized.
        dtype: of everything that is not quantized, and of the computation.
        device: where the model goes.
        block_size, double_quant: as in `lorakit.quantize`.
        quant_config: replaces quant_type, block_size and double_quant, and allows exceptions by module name.

    Returns:
        The model in eval mode, every parameter without gradient.

    Raises:
        CheckpointError: a file or tensor is missing, truncated, mis-shaped or unexpected, or cannot be quantized.
        ConfigError: the architecture or a feature of it is not supported, a setting is unknown or matches no module,
            or the folder is already quantized in a way that was not asked for or cannot be read; or this machine does
            not have the device.
    """
    device = check_device(device)
    requested = _requested(quant_type, block_size, double_quant, quant_config)
    folder = resolve_model(path)
    checkpoint = Checkpoint(folder)
    model, stored = empty_decoder(checkpoint), find_stored(checkpoint)
    names = check_tensors(checkpoint, model, stored)
    tensors: Iterator[tuple[str, Tensor | QuantizedWeight]]
    if stored:
        check_request(requested, stored, folder)
        tensors = stream_stored(checkpoint, names, stored, dtype, device, dequantize=requested.quant_type is None)
    else:
        tensors = stream_tensors(checkpoint, weight_formats(model, requested, names), dtype, device)
    for name, tensor in tensors:
        try:
            _assign(model, name, tensor, getattr(torch, requested.storage_dtype))
        except ShapeError as error:
            raise CheckpointError(f"{checkpoint.file(name)}: {name}: {error}") from None
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def empty_decoder(checkpoint: Checkpoint) -> Decoder:
    """Return the decoder that a checkpoint's config.json describes, on the meta device, which takes no memory.

    Raises:
        ConfigError: the architecture or a feature of it is not supported.
    """
    model = meta_decoder(decoder_config(checkpoint))
    model.folder = checkpoint.folder
    return model


def decoder_config(checkpoint: Checkpoint) -> DecoderConfig:
    """Return a checkpoint's configuration; a head that its tensors hold apart is not tied, whatever config.json says.

    Raises:
        ConfigError: as `DecoderConfig.from_dict`.
    """
    values = checkpoint.config()
    return replace(DecoderConfig.from_dict(values), tie_word_embeddings=is_head_tied(checkpoint, values))


def meta_decoder(config: DecoderConfig) -> Decoder:
    """Return a decoder on the meta device: modules and shapes that take no memory."""
    with torch.device("meta"), _NoInit():
        return Decoder(config)


def weight_formats(model: Decoder, config: QuantConfig, names: list[str]) -> dict[str, WeightFormat | None]:
    """Return how each tensor of a decoder is quantized, None for those that are not.

    Raises:
        ConfigError: a pattern has no effect, or it would quantize an output head that is tied to the embedding.
    """
    formats = config.assign(path for path, module in model.named_modules() if isinstance(module, nn.Linear))
    if model.config.tie_word_embeddings and formats["lm_head"] is not None:
        raise ConfigError("lm_head is tied to the embedding and cannot be quantized; name it in skip")
    return {name: formats.get(name.removesuffix(".weight")) for name in names}


def check_tensors(checkpoint: Checkpoint, model: Decoder, stored: Mapping[str, StoredWeight]) -> list[str]:
    """Return the names of the tensors that a decoder needs.

    Raises:
        CheckpointError: naming every one that is missing, unexpected or mis-shaped.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names if not name.endswith(_DERIVED)}
    for name, weight in stored.items():
        for part in weight.parts:
            del shapes[part]
        shapes[name] = weight.shape
    if model.config.tie_word_embeddings:
        del expected[HEAD]
        shapes.pop(HEAD, None)  # some writers store the tied head a second time
    linear = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    unexpected = [name for name in shapes if name not in expected]
    missing = [name for name in expected if name not in shapes]
    # Only those that will be shown get a hint: hints take longer to find than all the rest.
    hints = {name: did_you_mean(name, unexpected) for name in missing[:MOST_LISTED]}
    if HEAD in missing:
        hints[HEAD] = f"; if the head is the embedding, config.json must say {TIED_KEY}: true"
    problems = [f"{name} is missing{hints.get(name, '')} (expected shape {expected[name]})" for name in missing]
    problems += [f"{name} is not a tensor of {model.config.architecture}" for name in unexpected]
    problems += [
        f"{name} has shape {shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    problems += [
        f"{name} is in 4 bits, but only the weight of a linear layer can be"
        for name in stored
        if name in expected and name not in linear
    ]
    if problems:
        raise CheckpointError(f"{checkpoint.folder} does not fit its config.json:{listing(problems)}")
    return list(expected)


class _NoInit(TorchFunctionMode):
    """Make nn.init do nothing: a meta tensor has nothing to fill, yet `normal_` imports torch._dynamo, for 1 s."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", *args[:1])
        return func(*args, **(kwargs or {}))


def _requested(
    quant_type: str | None, block_size: int, double_quant: bool, quant_config: QuantConfig | None
) -> QuantConfig:
    if quant_config is None:
        return QuantConfig(quant_type=quant_type, block_size=block_size, double_quant=double_quant)
    if (quant_type, block_size, double_quant) != ("nf4", 64, True):
        raise ConfigError("give quant_config, or quant_type, block_size and double_quant, not both")
    return quant_config


def _assign(model: Decoder, name: str, tensor: Tensor | QuantizedWeight, storage_dtype: torch.dtype) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(tensor, QuantizedWeight):
        assert isinstance(module, nn.Linear)
        # The bias came before the weight, or is a meta tensor that is replaced when its own turn comes.
        model.set_submodule(owner, Linear4bit(tensor, module.bias, storage_dtype=storage_dtype))
    else:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
