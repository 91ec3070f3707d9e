"""One reused buffer per thread, for values that are dequantized, multiplied by and discarded."""

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
    """Return a CPU tensor of this shape and dtype with arbitrary content. This thread's next call reuses its memory.

    The buffer grows to the largest size requested and stays: the pages of a fresh buffer cost several times as much as
    dequantizing into it.
    """
    size = math.prod(shape) * dtype.itemsize
    if _buffer.memory.numel() < size:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside it
            _buffer.memory = torch.empty(size, dtype=torch.uint8)
    return _buffer.memory[:size].view(dtype).view(*shape)
