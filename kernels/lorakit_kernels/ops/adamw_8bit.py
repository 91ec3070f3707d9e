"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), with moments in fp32 and in 8 bits.

Other backends agree bit for bit on fp32 parameters, since no result here depends on an order of addition.
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch import operation
from ..operands import AdamWStep, Moment8bit
from .codec import dequantize_8bit, quantize_8bit

STATE_BLOCK_SIZE = 256  # elements of a moment that share a scale; Dettmers et al. use 2048, later versions 256


def adamw(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: AdamWStep) -> None:
    """Take one step of Adam with decoupled weight decay (algorithm 2 of the paper).

        m = beta1·m + (1 − beta1)·g          v = beta2·v + (1 − beta2)·g²
        parameter = (1 − lr·weight_decay)·parameter − lr / (1 − beta1^t) · m / (sqrt(v) / sqrt(1 − beta2^t) + eps)

    Every product, sum, quotient and root is rounded to fp32, in the order written below. The parameter is then rounded
    to its own dtype.

    Args:
        parameter: any shape, fp32, bf16 or fp16; overwritten.
        gradient: the parameter's shape and dtype.
        first, second: the moments m and v, fp32 of the parameter's shape; overwritten.
    """
    keep, step_size, root_scale = step.factors()
    g = gradient.float()
    first.mul_(step.beta1).add_(g * (1 - step.beta1))
    second.mul_(step.beta2).add_((g * g).mul_(1 - step.beta2))
    # A fifth of the fp32 roots that PyTorch takes from MKL are one unit off; fp64 roots always round correctly to fp32.
    root = second.double().sqrt().float()
    update = first / root.mul_(root_scale).add_(step.eps)
    parameter.copy_((parameter.float() * keep).sub_(update.mul_(step_size)))


def _no_result(parameter: Tensor, gradient: Tensor, first: Moment8bit, second: Moment8bit, step: AdamWStep) -> None:
    return None


@operation(writes=("parameter", "first_codes", "first_absmax", "second_codes", "second_absmax"), fake=_no_result)
def adamw_8bit(parameter: Tensor, gradient: Tensor, first: Moment8bit, second: Moment8bit, step: AdamWStep) -> None:
    """Take one step of `adamw` with the moments in 8 bits (Dettmers et al. 2021, arXiv:2110.02861, section 2).

    The moments are dequantized, updated, used and quantized again, in blocks of `STATE_BLOCK_SIZE` and to the exact
    nearest code. Zero stays zero.

    Args:
        parameter: any shape and strides, fp32, bf16 or fp16; elements are taken row-major; overwritten.
        gradient: the parameter's shape and dtype, any strides.
        first, second: the moments of these elements; their codes and scales are overwritten.
    """
    m, v = (
        dequantize_8bit.definition(moment.codes, moment.values, moment.absmax, STATE_BLOCK_SIZE).view(parameter.shape)
        for moment in (first, second)
    )
    adamw(parameter, gradient, m, v, step)
    for wide, moment in ((m, first), (v, second)):
        codes, absmax = quantize_8bit.definition(wide, moment.boundaries, STATE_BLOCK_SIZE)
        moment.codes.copy_(codes)
        moment.absmax.copy_(absmax)
