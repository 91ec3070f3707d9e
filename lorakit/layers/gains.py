"""The gain g on each row of an adapted weight, as DoRA has one: y = g∘(z + u) + b, z = x Wᵀ and u the adapter's update.

A layer has z already, so that an adapter adds g∘(z + u) - z = (g - 1)∘z + g∘u to it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gain_minus_one(gain: Tensor, dtype: torch.dtype) -> Tensor:
    """Return g - 1 in `dtype`, of g's shape. A short dtype keeps digits of it that it drops from g: bf16 has 1 and then
    1.0078."""
    return (gain - 1).to(dtype)


def compose(gain: Tensor, product: Tensor, update: Tensor) -> Tensor:
    """Return (g - 1)∘z + g∘u, in the dtype of z.

    Args:
        gain: g, fp32 or better, in a shape that broadcasts over z.
        product: z (..., out_features), without the bias.
        update: u, of z's shape and dtype.
    """
    return gain_minus_one(gain, product.dtype) * product + gain.to(product.dtype) * update
