"""SwiGLU. Its backward pass in `lorakit_kernels.ops.swiglu` recomputes the activation instead of keeping it."""

from __future__ import annotations

import lorakit_kernels as kernels
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 6). All tensors have one shape and dtype."""
    return kernels.swiglu(gate, up)
