"""What is known before the first step: whether records fit the model and files the disk, and which run it is.

An hour of training must not end in an error that was there from the beginning.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapters import adapter_configs
from ..adapters.attach.targeting import unwrapped
from ..data import Example
from ..errors import DataError, first_few
from ..files import check_space
from ..models.decoder.decoder import Decoder
from .config import TrainConfig
from .optimizers import OPTIMIZERS, Optimizer

if TYPE_CHECKING:
    from torch import Tensor

_WITHOUT_EFFECT = {  # settings that do not change the trained parameters
    "output", "progress", "eval_every", "checkpoint_every", "checkpointing", "offload_activations", "offload_optimizer",
}  # fmt: skip
_RUNNING = ("running_mean", "running_var", "num_batches_tracked")  # change while training
_SAMPLE = 256  # elements of a weight that tell it from another


def check_examples(model: nn.Module, examples: Sequence[Example]) -> None:
    """Make sure that every example fits the model's context, and that the model has a row for each of its tokens.

    Raises:
        DataError: naming each example that does not fit.
    """
    context = model.config.context_length if isinstance(model, Decoder) else math.inf
    long = [f"{example.source} ({max(example.lengths)})" for example in examples if max(example.lengths) > context]
    if long:
        raise DataError(f"longer than the model's context of {context} tokens: {', '.join(first_few(long))}")
    rows = vocabulary_rows(model)
    outside = [
        f"{example.source} (token {max(example.input_ids)})" for example in examples if max(example.input_ids) >= rows
    ]
    if outside:
        raise DataError(
            f"the model's embedding has {rows} rows, fewer than the tokenizer has tokens, and these need another: "
            f"{', '.join(first_few(outside))}"
        )


def vocabulary_rows(model: nn.Module) -> float:
    """Return the number of tokens that a model has a row for; infinity if it does not say."""
    if isinstance(model, Decoder):
        return model.config.vocab_size
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return math.inf
    rows = getattr(unwrapped(table), "num_embeddings", None) if isinstance(table, nn.Module) else None
    return rows if isinstance(rows, int) else math.inf


def check_room(
    folder: Path | None, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, config: TrainConfig
) -> None:
    """Make sure that the disk has room for the adapter and the checkpoints.

    Raises:
        StorageError: it has not.
    """
    if folder is None:
        return
    adapter = sum(parameter.nbytes for parameter in parameters.values())
    state = sum(sum(optimizer.state_bytes(parameter.numel()).values()) for parameter in parameters.values())
    written_beside = 2 if config.checkpoint_every else 0  # the new checkpoint is whole before the old one goes
    check_space(folder, adapter + written_beside * (adapter + state))


def fingerprint_of(
    config: TrainConfig,
    optimizer: Optimizer,
    examples: Sequence[Example],
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
) -> dict[str, Any]:
    """Return everything that a resumed run must share with the run that it continues, as JSON: key -> value or hash."""
    settings = config.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    # The optimizer's own values, in place of None.
    settings |= {name: optimizer.defaults[name] for name in OPTIMIZERS[config.optimizer].settings}
    for adapter, lora in adapter_configs(model).items():
        settings |= {f"{key} of adapter '{adapter}'": value for key, value in lora.peft_values().items()}
    settings["the training records"] = _hash(repr((one.input_ids, one.loss_mask)) for one in examples)
    settings["the trained parameters"] = _hash(
        f"{name} {tuple(parameter.shape)} {parameter.dtype}" for name, parameter in parameters.items()
    )
    settings["the base model"] = _base_hash(model, parameters)
    result: dict[str, Any] = json.loads(json.dumps(settings))  # as a checkpoint has it
    return result


def _hash(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
    return digest.hexdigest()


def _base_hash(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> str:
    """Return a hash of the frozen tensors' names, shapes, dtypes and some of their values, and of a decoder's shape."""
    parts: list[bytes] = [repr(model.config).encode() if isinstance(model, Decoder) else b""]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in trained and not name.endswith(_RUNNING):
            parts += [f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), _sample(tensor.detach())]
    return _hash(parts)


def _sample(tensor: Tensor) -> bytes:
    try:
        plain = tensor.as_subclass(torch.Tensor)  # bitsandbytes' parameters quantize themselves when they move
        values = plain.flatten()[:: max(1, tensor.numel() // _SAMPLE)].cpu().contiguous()
        return values.view(torch.uint8).numpy().tobytes()
    except (NotImplementedError, RuntimeError, TypeError):  # on meta, or without bytes of its own
        return b""
