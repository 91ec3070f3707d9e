"""The backend in plain PyTorch, which runs anywhere: every operation is its definition in `ops`."""

from .ops import adamw_8bit as optimizer
from .ops import codec, dropout
from .ops import cross_entropy as loss
from .ops import linear_4bit as products
from .ops import rms_norm as norm
from .ops import rope as rotation
from .ops import swiglu as activation

quantize_4bit = codec.quantize_4bit.definition
quantize_8bit = codec.quantize_8bit.definition
dequantize_4bit_out = codec.dequantize_4bit_out.definition
dequantize_8bit = codec.dequantize_8bit.definition
gather_4bit = codec.gather_4bit.definition
linear_4bit = products.linear_4bit.definition
linear_4bit_dx = products.linear_4bit_dx.definition
add_linear_4bit_dx = products.add_linear_4bit_dx.definition
rms_norm = norm.rms_norm.definition
rms_norm_backward = norm.rms_norm_backward.definition
rope = rotation.rope.definition
swiglu = activation.swiglu.definition
swiglu_backward = activation.swiglu_backward.definition
drop = dropout.drop.definition
cross_entropy = loss.cross_entropy.definition
adamw_8bit = optimizer.adamw_8bit.definition
