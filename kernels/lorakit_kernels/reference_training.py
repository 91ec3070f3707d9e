"""The definition, in plain PyTorch, of the operations of a training step that no 4-bit weight takes part in.

RMSNorm, rotary embedding, SwiGLU, dropout, the loss of a chunk of logits, and AdamW with its moments in 8 bits: what
`reference` is for the codec, this file is for them. Results of other backends agree to the rounding of a sum or of an
exponential; those of dropout, and of AdamW on fp32 parameters, agree bit for bit, since nothing there depends on an
order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from .reference import dequantize_8bit, quantize_8bit

STATE_BLOCK_SIZE = 256  # elements of a moment that share a scale; Dettmers et al. use 2048, later versions 256

# ---- RMSNorm with a frozen weight ----------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return weight * x·rstd and rstd = 1 / sqrt(mean(x²) + eps) (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4).

    Statistics are fp32; x·rstd is rounded to x's dtype before the weight multiplies it, as transformers does.

    Args:
        x: (..., size), fp32, bf16 or fp16.
        weight: (size,).

    Returns:
        y (..., size) in the dtype that x and weight promote to, and rstd (..., 1) fp32.
    """
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * rstd).to(x.dtype), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """Return dx = rstd·(g − x̂·mean(g·x̂)) with x̂ = x·rstd and g = weight·dy, in x's shape and dtype."""
    normed = x.float() * rstd
    g = (dy * weight).float()
    dx = (g - normed * (g * normed).mean(-1, keepdim=True)) * rstd
    return dx.to(x.dtype)


# ---- rotary embedding ----------------------------------------------------------------------------------------------


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate each pair (i, i + head_dim / 2) of q and k by its token's angle (Su et al., arXiv:2104.09864, eq. 34).

    Args:
        q: (tokens, heads, head_dim).
        k: (tokens, kv_heads, head_dim).
        cos, sin: (tokens, head_dim), of the angles, whose second half repeats the first. A row a token: positions may
            start anew anywhere, as they do in a packed batch.
        backward: rotate by −angle, which is the inverse, and so also what gradients go through.

    Returns:
        The rotated q and k, of the same shapes and dtypes.
    """
    sin = -sin if backward else sin
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


# ---- SwiGLU --------------------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 6); both of one shape and dtype."""
    return silu(gate).mul_(up)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return dgate = dy·up·σ·(1 + gate·(1 − σ)) and dup = dy·gate·σ, with σ = sigmoid(gate) computed anew."""
    return torch.ops.aten.silu_backward(dy * up, gate), silu(gate).mul_(dy)


# ---- dropout -------------------------------------------------------------------------------------------------------

GROUP = 64  # elements that take the four words of 16 counters


def drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Return x with each element zero with probability p, to 2^-32.

    That is dropout (Srivastava et al. 2014) without its factor 1 / (1 − p). What is dropped follows from the seed and
    the place alone, on every device: none of it need be kept for the backward pass. Element i is dropped where its word
    of Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405) with the key `seed` is below p·2^32: word
    (i / 16) mod 4 of counter 16·(i / 64) + i mod 16.

    Args:
        x: any shape, elements counted row-major.
        seed: () int64, on the CPU.
        p: from 0 to below 1.

    Raises:
        ValueError: p is outside of that.
    """
    threshold = drop_threshold(p)
    groups = -(-x.numel() // GROUP)
    counters = torch.arange(GROUP // 4 * groups, device=x.device)
    zero = torch.zeros_like(counters)
    words = philox(torch.stack([counters & 2**32 - 1, counters >> 32, zero, zero]), int(seed))
    place = words.view(4, groups, GROUP // 4).transpose(0, 1).reshape(-1)[: x.numel()].view(x.shape)
    return x.masked_fill(place < threshold, 0)


def drop_threshold(p: float) -> int:
    """Return p·2^32, rounded: the words below it drop their elements. At most 2^32 − 1, which a word can hold."""
    if not 0 <= p < 1:
        raise ValueError(f"the probability of dropping must be from 0 to below 1, got {p}")
    return min(round(p * 2**32), 2**32 - 1)


def philox(counters: Tensor, key: int) -> Tensor:
    """Return the four words of Philox4x32-10 of each counter, like these (4, ...) int64 in 0 .. 2^32 − 1.

    Args:
        counters: words of 32 bits, the lowest first.
        key: of 64 bits.
    """
    low = 2**32 - 1
    a, b, c, d = counters
    first, second = key & low, key >> 32 & low
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57  # the bits of unsigned 64-bit products; int64 wraps around
        a, b = (right >> 32 & low) ^ b ^ first, right & low
        c, d = (left >> 32 & low) ^ d ^ second, left & low
        first, second = first + 0x9E3779B9 & low, second + 0xBB67AE85 & low
    return torch.stack([a, b, c, d])


# ---- cross-entropy of a chunk of logits ----------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    """Return −log softmax(logits)[target] of each row, and leave the gradient of their sum where the logits were.

    Args:
        logits: (rows, vocabulary), contiguous; with `with_gradient` overwritten by softmax(logits) − onehot(target),
            rounded once from fp32.
        targets: (rows,) int64.

    Returns:
        (rows,) fp32.
    """
    shifted = logits.float() - logits.amax(dim=-1, keepdim=True).float()
    # Not log_softmax, whose sum has one accumulator a lane: over millions of logits it loses four digits.
    log_probs = shifted.sub_(shifted.exp().sum(dim=-1, keepdim=True).log_())
    losses = -log_probs.gather(1, targets[:, None]).squeeze(1)
    if with_gradient:
        gradient = torch.exp(log_probs, out=logits if logits.dtype == torch.float32 else log_probs)
        gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
        if gradient is not logits:
            logits.copy_(gradient)
    return losses


# ---- AdamW ---------------------------------------------------------------------------------------------------------


class AdamWFactors(NamedTuple):
    """The factors of step t that are alike for all elements; they act as fp32 numbers, whatever computes.

    Attributes:
        keep: 1 − lr·weight_decay, of the parameter.
        step_size: lr / (1 − beta1^t).
        root_scale: 1 / sqrt(1 − beta2^t).
    """

    keep: float
    step_size: float
    root_scale: float

    @staticmethod
    def of_step(step: int, lr: float, beta1: float, beta2: float, weight_decay: float) -> AdamWFactors:
        """Return the factors of step `step`, counted from 1."""
        return AdamWFactors(1 - lr * weight_decay, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step))


def adamw(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Take one step of Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2).

        m = beta1·m + (1 − beta1)·g          v = beta2·v + (1 − beta2)·g²
        parameter = (1 − lr·weight_decay)·parameter − lr / (1 − beta1^t) · m / (sqrt(v) / sqrt(1 − beta2^t) + eps)

    Every product, sum, quotient and root is rounded to fp32, in the order written below; the parameter is rounded once
    more, to its own dtype.

    Args:
        parameter: any shape, fp32, bf16 or fp16; overwritten.
        gradient: of its shape and dtype.
        first, second: the moments m and v, of its shape, fp32; overwritten.
        step: t, counted from 1.
    """
    keep, step_size, root_scale = AdamWFactors.of_step(step, lr, beta1, beta2, weight_decay)
    g = gradient.float()
    first.mul_(beta1).add_(g * (1 - beta1))
    second.mul_(beta2).add_((g * g).mul_(1 - beta2))
    # Where PyTorch takes fp32 roots from MKL, a fifth are one unit off; those of fp64 always round to the right one.
    root = second.double().sqrt().float()
    update = first / root.mul_(root_scale).add_(eps)
    parameter.copy_((parameter.float() * keep).sub_(update.mul_(step_size)))


def adamw_8bit(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    first_absmax: Tensor,
    second: Tensor,
    second_absmax: Tensor,
    first_map: tuple[Tensor, Tensor],
    second_map: tuple[Tensor, Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Take one step of `adamw` with the moments in 8 bits (Dettmers et al. 2021, arXiv:2110.02861, section 2).

    The moments are dequantized, updated, used, and quantized again, each in blocks of `STATE_BLOCK_SIZE` and with the
    exact nearest code: zero stays zero.

    Args:
        parameter, gradient: as for `adamw`, contiguous.
        first, second: (numel,) uint8 codes of the moments; overwritten.
        first_absmax, second_absmax: (ceil(numel / STATE_BLOCK_SIZE),) fp32; overwritten.
        first_map, second_map: values (256,) and boundaries (255,), both fp32, of the codes, ascending.
    """
    shape = parameter.shape
    m = dequantize_8bit(first, first_map[0], first_absmax, STATE_BLOCK_SIZE).view(shape)
    v = dequantize_8bit(second, second_map[0], second_absmax, STATE_BLOCK_SIZE).view(shape)
    adamw(parameter, gradient, m, v, lr, beta1, beta2, eps, weight_decay, step)
    for wide, (_, boundaries), codes, absmax in (
        (m, first_map, first, first_absmax),
        (v, second_map, second, second_absmax),
    ):
        new_codes, new_absmax = quantize_8bit(wide, boundaries, STATE_BLOCK_SIZE)
        codes.copy_(new_codes)
        absmax.copy_(new_absmax)
