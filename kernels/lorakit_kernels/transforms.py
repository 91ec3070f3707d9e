"""Whether plain PyTorch has to compute, since a gradient by hand would be wrong or missing.

The transforms of torch.func and forward-mode differentiation need a rule for every operation that they meet. PyTorch's
own operations have them. Functions with a gradient by hand have a rule for one backward pass alone, so within a
transform the definition computes in their place.
"""

from __future__ import annotations

from torch import _C, Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Return whether a transform of torch.func (vmap, grad, jvp, ...) or forward-mode differentiation is at work."""
    # PyTorch asks the same in `autograd.Function.apply`; it takes 60 ns. Within `dual_level`, the level is 0 or more.
    return _C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_followed(tensor: Tensor) -> bool:
    """Return whether autograd or a transform follows what is computed from a tensor of any shape and dtype."""
    if tensor.requires_grad or _C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
