"""The values of a frozen layer's weight, however it is kept: dense, in lorakit's 4 bits or in bitsandbytes' codes.

A transformers model that was loaded with bitsandbytes holds layers of its classes. Their 4-bit weights are the bytes of
its file format, so they are read as from a file. bitsandbytes is not imported here: a layer of its classes exists only
if somebody else has imported it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import AdapterError
from ...quantization import QuantizedWeight
from ...quantization.bnb_format import from_tensors
from .calls import has_hooks, is_dense, loaded, present
from .linear4bit import Linear4bit
from .quantized_module import QuantizedModule

_LARGEST_CODE = 127  # of 8 bits


def values_of(module: nn.Module, dtype: torch.dtype, rows: slice | None = None, name: str = "weight") -> Tensor | None:
    """Return the dense values of a layer's weight, or some of its rows; None if it holds codes of an unknown kind.

    Shapes:
        that of the weight; (out_features, in_features) for a linear layer whose weight is kept in codes
    """
    if isinstance(module, QuantizedModule):
        with loaded(module):
            return module.dense_weight(dtype, rows)
    if (weight := bitsandbytes_4bit(module)) is not None:
        return weight.dequantize(dtype, rows=rows)
    chosen = slice(None) if rows is None else rows
    codes: Any = _weight_of(module, "Int8Params")
    if codes is not None and codes.dtype == torch.int8:
        state = getattr(module, "state", None)
        scales = codes.SCB if codes.SCB is not None else getattr(state, "SCB", None)  # the first forward moves them
        if scales is None:
            return None
        wide = codes.detach().as_subclass(Tensor)[chosen].float()
        values: Tensor = (wide * (scales.to(wide.device).float()[chosen, None] / _LARGEST_CODE)).to(dtype)
        return values
    values = present(module, name)
    return values.detach()[chosen].to(dtype) if is_dense(values) else None


def is_bitsandbytes(module: nn.Module) -> bool:
    """Return whether a layer is one of bitsandbytes whose values lorakit can read."""
    return any(_weight_of(module, kind) is not None for kind in ("Params4bit", "Int8Params"))


def bitsandbytes_4bit(module: nn.Module) -> QuantizedWeight | None:
    """Return the weight of a layer of bitsandbytes in 4 bits, which shares its bytes; None for another layer.

    Raises:
        CheckpointError: its quant_state is malformed.
    """
    weight: Any = _weight_of(module, "Params4bit")
    state = getattr(weight, "quant_state", None)
    if state is None:
        return None
    packed = weight.detach().as_subclass(Tensor)
    if _is_rearranged(weight):
        return _unpacked(packed, state)
    return from_tensors("weight", {"": packed, **state.as_dict(packed=True)})


def call_layer(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a frozen layer.

    In evaluation, bitsandbytes rearranges a 4-bit weight for its kernel on CPUs. That kernel has no gradient, so none
    would reach x, without a word. lorakit's product takes its place then.

    Raises:
        AdapterError: hooks on such a layer would not run.
    """
    weight = module._parameters.get("weight")
    if type(weight) is nn.Parameter or not _is_rearranged(weight) or not torch.is_grad_enabled():
        return module(*args, **kwargs)
    if not any(isinstance(one, Tensor) and one.requires_grad for one in (*args, *kwargs.values())):
        return module(*args, **kwargs)
    if has_hooks(module):
        raise AdapterError("bitsandbytes' kernel for CPUs has no gradient, so a layer with hooks cannot be trained")
    codes: Any = bitsandbytes_4bit(module)
    return Linear4bit(codes, cast(Tensor | None, module.bias), cast(Any, module).compute_dtype)(*args, **kwargs)


def _is_rearranged(weight: object) -> bool:
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def _weight_of(module: nn.Module, kind: str) -> Tensor | None:
    """Return a module's weight if it is of this class of bitsandbytes."""
    weight = module._parameters.get("weight")
    if type(weight) is nn.Parameter:  # nearly always
        return None
    names = (one.__name__ for one in type(weight).__mro__ if one.__module__.startswith("bitsandbytes."))
    return weight if kind in names else None


def _unpacked(packed: Tensor, state: Any) -> QuantizedWeight:
    """Return a weight that bitsandbytes has rearranged for its kernel on CPUs, which also drops the nested scales.

    Shapes:
        packed (out_features, in_features / 2): blocks of 32 rows, in each the codes of two neighbours for all 32 rows
        after each other; each run of 64 codes is kept as 32 low nibbles and 32 high ones. absmax (in_features / block
        size, out_features)
    """
    rows, columns = state.shape
    pairs = packed.reshape(-1, 32)
    codes = torch.cat([pairs & 15, pairs >> 4], dim=1).view(rows // 32, columns // 2, 32, 2)
    codes = codes.transpose(1, 2).reshape(rows, columns)
    return QuantizedWeight(
        codes[:, 0::2] << 4 | codes[:, 1::2], state.absmax.T.reshape(-1).float(), torch.Size((rows, columns)),
        state.original_dtype, state.quant_type, state.blocksize, state.code.float(),
    )  # fmt: skip
