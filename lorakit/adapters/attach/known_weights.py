"""Whether a layer's output is the product with its weight: some adapters need that, and every merge does.

A subclass may scale, normalize or quantize its weight in forward, and hooks may change what comes out. For a class that
lorakit does not know, and for a layer with hooks, this is tried: a change D of the weight must change the output by
x Dᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...layers import AdaptedLayer, LoRAParameter
from ...layers.frozen.calls import (
    PLAIN_TENSORS,
    change_of_output,
    has_own_forward,
    is_dense,
    is_known_class,
)
from ...layers.frozen.quantized_module import QuantizedModule
from ...layers.frozen.values import is_bitsandbytes, values_of

# A forward that does something else is off by about the whole change, rounding in fp32 by 1e-6 of it.
_MOST_OFF = 1e-3


def weight_problem(layer: AdaptedLayer) -> str | None:
    """Return why the values of a layer's base weight are not known, to follow "which"; None if they are."""
    base, weight = layer.base_layer, layer.base_layer._parameters.get("weight")
    if isinstance(layer, LoRAParameter) or isinstance(base, QuantizedModule):
        return None
    if is_bitsandbytes(base):
        return None if values_of(base, torch.float32, slice(0, 1)) is not None else "is not quantized yet"
    if weight is None:
        return "computes its weight anew in each pass (parametrized, normalized or pruned)"
    if not is_dense(weight):
        return f"keeps its weight in {str(weight.dtype)[6:]}, a quantization that lorakit does not know"
    if type(weight) not in PLAIN_TENSORS and type(weight).__name__ != "DTensor":
        return f"keeps its weight as a {type(weight).__name__}, which lorakit does not know"
    if weight.is_meta or is_known_class(base) or not has_own_forward(base) or layer.takes_weight:
        return None
    return None if is_product_with(layer, base) else "has a forward of its own that is not the product with its weight"


@torch.no_grad()
def is_product_with(layer: AdaptedLayer, module: nn.Module) -> bool:
    """Return whether a change of a module's weight changes its output as an update of the layer does."""
    weight = module._parameters.get("weight")
    assert weight is not None
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(weight.shape, generator=generator).to(weight.device)
    change *= values_of(module, torch.float32).norm() / change.norm()  # type: ignore[union-attr]
    x = layer.made_up_input(generator).to(weight.device)
    found = change_of_output(module, change, x)
    expected: Tensor = layer.apply_matrix(layer.as_matrix(change), x)
    if found is None or found.shape != expected.shape:
        return False
    return bool((found - expected).norm() <= _MOST_OFF * expected.norm())
