"""One reused buffer per thread, for what is dequantized, multiplied by and forgotten."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class _Buffer(threading.local):
    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)


_buffer = _Buffer()


def workspace(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor on the CPU with arbitrary content, which this thread's next call returns again.

    It grows to the largest that was asked for and stays: the pages of a fresh buffer cost several times what it costs
    to dequantize into it.
    """
    size = math.prod(shape) * dtype.itemsize
    if _buffer.memory.numel() < size:
        with torch.inference_mode(False):  # what is made in inference mode could not be written to outside of it
            _buffer.memory = torch.empty(size, dtype=torch.uint8)
    return _buffer.memory[:size].view(dtype).view(*shape)
