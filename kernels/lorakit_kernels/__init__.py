"""Device code of lorakit: tensors in, tensors out, no knowledge of the library above.

`ops` has one file per operation, with its definition in plain PyTorch, its registration and its gradient. Three
backends compute the operations: `reference` runs the definitions, `cpu` is C++, `triton` is Triton for GPUs. `dispatch`
picks one. `operands` defines the arguments that are records: a 4-bit weight, an 8-bit moment, a step of AdamW.
"""

from . import environment  # noqa: F401 - before torch: its libraries read the environment when they load
from .cpu import one_thread
from .dispatch import BACKENDS, use_backend
from .operands import AdamWStep, Moment8bit, Weight4bit
from .ops.adamw_8bit import STATE_BLOCK_SIZE, adamw, adamw_8bit
from .ops.codec import (
    dequantize_4bit,
    dequantize_4bit_out,
    dequantize_8bit,
    gather_4bit,
    quantize_4bit,
    quantize_8bit,
    unpack_4bit,
)
from .ops.cross_entropy import cross_entropy
from .ops.dropout import drop
from .ops.linear_4bit import add_linear_4bit_dx, linear_4bit, linear_4bit_dx
from .ops.rms_norm import rms_norm, rms_norm_backward
from .ops.rope import rope
from .ops.swiglu import swiglu, swiglu_backward
from .transforms import is_transformed

__all__ = [
    "BACKENDS",
    "STATE_BLOCK_SIZE",
    "AdamWStep",
    "Moment8bit",
    "Weight4bit",
    "adamw",
    "adamw_8bit",
    "add_linear_4bit_dx",
    "cross_entropy",
    "dequantize_4bit",
    "dequantize_4bit_out",
    "dequantize_8bit",
    "drop",
    "gather_4bit",
    "is_transformed",
    "linear_4bit",
    "linear_4bit_dx",
    "one_thread",
    "quantize_4bit",
    "quantize_8bit",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "swiglu",
    "swiglu_backward",
    "unpack_4bit",
    "use_backend",
]
