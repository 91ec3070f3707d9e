"""Activations of a training step: kept for the backward pass, in memory of device or host, or recomputed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import TrainingError
from ..models.decoder.decoder import Decoder

SMALLEST_OFFLOADED = 1 << 20  # bytes; a smaller copy costs more in waiting than it frees


@contextlib.contextmanager
def saving_activations(
    model: nn.Module, checkpointing: Literal["none", "mlp", "layer"] | int, offload: bool = False
) -> Iterator[None]:
    """Within the context, keep activations for the model's backward pass as the settings say.

    Args:
        model: a `Decoder`, or a transformers model, whose layers are all checkpointed or none.
        checkpointing: the parts to recompute instead of keeping them, see `Decoder.set_checkpointing`.
        offload: whether kept activations leave the GPU, see `HostActivations`.

    Raises:
        TrainingError: the model does not offer this kind of checkpointing, or there is no GPU to relieve.
    """
    with contextlib.ExitStack() as stack:
        if offload:
            device = next(model.parameters()).device
            if device.type == "cpu":
                raise TrainingError(
                    "offload_activations moves activations from a GPU to host memory, but the model is on the CPU; "
                    "leave it out, and use checkpointing to save memory"
                )
            stack.enter_context(HostActivations(model))
        stack.enter_context(_checkpointing(model, checkpointing))
        yield


class HostActivations(saved_tensors_hooks):
    """Within the context, tensors of `smallest` bytes or more that autograd saves go to host memory until needed.

    The model's own parameters and buffers stay where they are, and so do views of them. A tensor that is saved twice is
    copied once. Both copies wait in the queue of the device's own work: nothing is read before it has arrived, and no
    memory is reused before it is copied. Under checkpointing the inputs of the checkpointed parts are moved. The
    recomputed tensors are needed at once and stay.
    """

    def __init__(self, model: nn.Module, smallest: int = SMALLEST_OFFLOADED) -> None:
        of_model = {_storage(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())}
        copies = WeakTensorKeyDictionary()  # tensor -> (its version when copied, its copy), while the tensor lives

        def to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
            in_backward = torch._C._current_graph_task_id() != -1
            if in_backward or tensor.nbytes < smallest or _storage(tensor) in of_model:
                return tensor.device, tensor.detach()  # an output that held itself would never be freed
            version, host = copies.get(tensor, (None, None))
            if host is None or version != tensor._version:
                host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type != "cpu")
                host.copy_(tensor, non_blocking=True)
                copies[tensor] = tensor._version, host
            return tensor.device, host

        def from_host(saved: tuple[torch.device, Tensor]) -> Tensor:
            device, tensor = saved
            return tensor.to(device, non_blocking=True)

        super().__init__(to_host, from_host)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def _checkpointing(model: nn.Module, how: Literal["none", "mlp", "layer"] | int) -> Iterator[None]:
    if how == "none":
        yield
    elif isinstance(model, Decoder):
        model.set_checkpointing(how)
        try:
            yield
        finally:
            model.set_checkpointing("none")
    elif how == "layer" and hasattr(model, "gradient_checkpointing_enable"):
        transformers_model: Any = model
        transformers_model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            transformers_model.gradient_checkpointing_disable()
    else:
        raise TrainingError(f"{type(model).__name__} does not offer checkpointing: {how}")
