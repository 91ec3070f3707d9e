"""Names and shapes of an adapter's tensors in PEFT's files.

    lora_A.weight           (r, in_features)
    lora_B.weight           (out_features, r)
    lora_B.bias             (out_features,)                                     lora_bias
    lora_magnitude_vector   (out_features,), of a convolution (1, out, 1, 1)    DoRA
    lora_embedding_A, _B    (r, vocabulary), (dim, r)
    base_layer.bias         (out_features,)                                     bias of an adapted layer
    <parameter>             as it is                                            modules_to_save, bias of other modules
    token_adapter.trainable_tokens_delta    (tokens, dim), rows, not differences

each after base_model.model.<path of the module>. The adapter's name is in none of them. Of several adapted parameters
of one module the last is at the module's path, the one before at <path of the module>.base_layer, and so on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..layers import AdapterPart, LoRAConv, LoRALinear, LoRAParameter
from .attach import adapter_parts
from .placing import Placement
from .targeting import unwrapped

PREFIX = "base_model.model."

# Where the file's name of a table is not ours.
_KEYS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_bias": "lora_B.bias",
    "trained_bias": "base_layer.bias",
    "trainable_tokens_delta": "token_adapter.trainable_tokens_delta",
}


def file_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return an adapter's tensors as a file has them, key -> tensor; they share memory with the parameters."""
    found: dict[str, Tensor] = {}
    parts = [(_logical(path, part), part) for path, part in adapter_parts(model, name).items()]
    for prefix, part in _with_prefixes(parts):
        for table, parameter in part.parameters_of(name).items():
            shape = _shape(part, table, tuple(parameter.shape))
            found[f"{prefix}.{_KEYS.get(table, table)}"] = parameter.detach().view(shape)
        if isinstance(part, LoRALinear) and part.adapters[name].variant.kept:  # a start inside the base: twice the rank
            up, down = part.factors(name)
            found[f"{prefix}.lora_A.weight"] = down.detach()
            found[f"{prefix}.lora_B.weight"] = up.detach() / part.scaling[name]
    return found


def file_shapes(placements: Iterable[Placement]) -> dict[str, tuple[int, ...]]:
    """Return what a file of an adapter has to hold, key -> shape."""
    placements = list(placements)
    prefixes = [prefix for prefix, _ in _with_prefixes([(p.path, p.part) for p in placements])]
    return {
        f"{prefix}.{_KEYS.get(table, table)}": _shape(placement.part, table, shape)
        for prefix, placement in zip(prefixes, placements, strict=True)
        for table, shape in placement.shapes.items()
    }


@torch.no_grad()
def write_tensors(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """Copy a file's tensors, which have been checked, into an adapter of the model."""
    for key, parameter in file_tensors(model, name).items():
        parameter.copy_(tensors[key])


def _shape(part: AdapterPart, table: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(part, LoRAConv) and table == "lora_magnitude_vector":
        return (1, *shape, *(1 for _ in part.kernel[1:]))
    return shape


def _with_prefixes(parts: list[tuple[str, AdapterPart]]) -> Iterator[tuple[str, AdapterPart]]:
    """Give each part of an adapter, by the path of its module, the beginning of its keys."""
    adapted: dict[str, list[str]] = {}
    for path, part in parts:
        if isinstance(part, LoRAParameter):
            adapted.setdefault(path, []).append(part.parameter)
    for path, part in parts:
        depth = 0
        if isinstance(part, LoRAParameter):
            order = [name for name, _ in unwrapped(part).named_parameters(recurse=False) if name in adapted[path]]
            depth = len(order) - 1 - order.index(part.parameter)
        yield f"{PREFIX}{path}{'.base_layer' * depth}", part


def _logical(path: str, part: AdapterPart) -> str:
    """The path of the module that a part adapts; a parameter's part may be inside another one's."""
    while isinstance(part, LoRAParameter) and path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path
