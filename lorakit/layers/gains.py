"""The gain g on each row of an adapted weight, as in DoRA: y = g∘(z + u) + b, with z = x Wᵀ and the update u.

A layer has z already, so an adapter adds g∘(z + u) - z = (g - 1)∘z + g∘u to it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gain_minus_one(gain: Tensor, dtype: torch.dtype) -> Tensor:
    """Return g - 1 in `dtype`, of g's shape.

    A short dtype keeps digits of g - 1 that it would drop from g: in bf16, the number after 1 is 1.0078.
    """
    return (gain - 1).to(dtype)


def compose(gain: Tensor, product: Tensor, update: Tensor) -> Tensor:
    """Return (g - 1)∘z + g∘u, in the dtype of z.

    Args:
        gain: g, fp32 or better, in a shape that broadcasts over z.
        product: z (..., out_features), without the bias.
        update: u, of z's shape and dtype.
    """
    return gain_minus_one(gain, product.dtype) * product + gain.to(product.dtype) * update
