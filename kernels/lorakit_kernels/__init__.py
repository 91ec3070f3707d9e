"""Device code of lorakit: tensors in, tensors out, no knowledge of the library above.

`reference` defines every operation in plain PyTorch and runs anywhere; it is the oracle for all other backends.
`cpu` is the same in C++, `triton` in Triton for GPUs. `dispatch` registers the operations with torch.library and picks
the backend. `reference_training` and `training_ops` are the same for the operations around the 4-bit weights;
`gradients` are those of both.
"""

from . import gradients, reference, reference_training
from .cpu import one_thread
from .dispatch import (
    BACKENDS,
    add_linear_4bit_dx,
    dequantize_4bit,
    dequantize_4bit_out,
    dequantize_8bit,
    linear_4bit,
    linear_4bit_dx,
    quantize_4bit,
    quantize_8bit,
    use_backend,
)
from .training_ops import (
    adamw_8bit,
    cross_entropy,
    drop,
    rms_norm,
    rms_norm_backward,
    rope,
    swiglu,
    swiglu_backward,
)

__all__ = [
    "BACKENDS",
    "adamw_8bit",
    "add_linear_4bit_dx",
    "cross_entropy",
    "dequantize_4bit",
    "dequantize_4bit_out",
    "dequantize_8bit",
    "drop",
    "gradients",
    "linear_4bit",
    "linear_4bit_dx",
    "one_thread",
    "quantize_4bit",
    "quantize_8bit",
    "reference",
    "reference_training",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "swiglu",
    "swiglu_backward",
    "use_backend",
]
