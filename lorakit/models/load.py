"""`load_model`: a Hugging Face folder to a `Decoder`, tensor by tensor, quantizing on the way.

At no time is more than one 16-bit tensor in memory besides the result.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from ..errors import CheckpointError, did_you_mean
from ..layers import Linear4bit
from ..quantization import quantize
from .checkpoint import Checkpoint
from .config import DecoderConfig
from .decoder import Decoder
from .pretrained import resolve_model

_DERIVED = ("rotary_emb.inv_freq",)  # buffers that old checkpoints carry and every implementation recomputes


def load_model(
    path: str | os.PathLike[str],
    quant_type: str | None = "nf4",
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    block_size: int = 64,
    double_quant: bool = True,
) -> Decoder:
    """Load a frozen decoder from a Hugging Face checkpoint folder.

    Args:
        path: the folder, or the name of a known model such as "smollm2-135m-instruct".
        quant_type: 4-bit type of every linear layer but the output head; None: not quantized.
        dtype: of everything that is not quantized, and of the computation.
        device: where the model goes.
        block_size, double_quant: as in `lorakit.quantize`.

    Returns:
        The model in eval mode, every parameter without gradient.

    Raises:
        CheckpointError: a file or tensor is missing, truncated, mis-shaped or unexpected.
        ConfigError: the architecture or a feature of it is not supported.
    """
    folder = resolve_model(path)
    checkpoint = Checkpoint(folder)
    config = DecoderConfig.from_dict(checkpoint.config())
    with torch.device("meta"):
        model = Decoder(config)
    model.folder = folder
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    _check_names(checkpoint, shapes, config)
    for name in shapes:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = checkpoint.read(name).to(device)
        if quant_type and leaf == "weight" and isinstance(module, nn.Linear) and module is not model.lm_head:
            # A meta bias is replaced when its own turn comes.
            layer = Linear4bit(quantize(tensor, quant_type, block_size, double_quant), module.bias)
            model.set_submodule(owner, layer)
        else:
            parameter = nn.Parameter(tensor.to(dtype, copy=True), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, parameter)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def _check_names(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], config: DecoderConfig) -> None:
    """Report every missing, unexpected and mis-shaped tensor in one error."""
    ignored = {name for name in checkpoint.names if name.endswith(_DERIVED)}
    if config.tie_word_embeddings:
        ignored.add("lm_head.weight")  # some writers store the tied head a second time
    unexpected = [name for name in checkpoint.names if name not in shapes and name not in ignored]
    problems = [
        f"{name} is missing{did_you_mean(name, unexpected)} (expected shape {shape})"
        for name, shape in shapes.items()
        if name not in checkpoint
    ]
    problems += [f"{name} is not a tensor of {config.architecture}" for name in unexpected]
    problems += [
        f"{name} has shape {checkpoint.shape(name)}, expected {shape}"
        for name, shape in shapes.items()
        if name in checkpoint and checkpoint.shape(name) != shape
    ]
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:20])
        more = f"\n  (+{len(problems) - 20} more)" if len(problems) > 20 else ""
        raise CheckpointError(f"{checkpoint.folder} does not fit its config.json:{shown}{more}")
