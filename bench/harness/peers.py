"""The peers as the measurements use them, each with its best documented settings; none has to be installed.

torchao's NF4 is compiled with torch.compile, as in its recipes; eager, it takes two to four times as long. Like the
others it has blocks of 64, with scales in blocks of 256. But it rounds the scales to the weight's dtype and to 8 bits
in even steps, so its values differ, and only its time is compared. NF4 is in `torchao.quantization` since 0.18, before
in `torchao.dtypes`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

NF4_BLOCK, NF4_SCALER_BLOCK = 64, 256
_NF4_MODULE = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"


def has(name: str) -> bool:
    """Return whether a peer is installed."""
    return importlib.util.find_spec(name) is not None


def dequantized_by_bitsandbytes(weight: Tensor) -> Callable[[], Any]:
    """Return a call that dequantizes the weight, quantized with double quantization."""
    functional = importlib.import_module("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return lambda: functional.dequantize_4bit(packed, state)


def quantized_by_bitsandbytes(weight: Tensor) -> Callable[[], Any]:
    """Return a call that quantizes the weight with double quantization."""
    functional = importlib.import_module("bitsandbytes.functional")
    return lambda: functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)


def bitsandbytes_layer(dense: nn.Linear) -> nn.Module:
    """Return bitsandbytes' 4-bit layer with the weight of a dense one, on its device and of its dtype.

    In eval mode on the CPU it repacks its weight at the first call and rounds its scales.
    """
    bnb = importlib.import_module("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        dense.in_features, dense.out_features, bias=False, compute_dtype=dense.weight.dtype, quant_type="nf4"
    )
    layer.load_state_dict(dense.state_dict())
    result: nn.Module = layer.to(dense.weight.device).requires_grad_(False)
    return result


def merged_by_peft(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight (out, in) in bitsandbytes' 4 bits, dequantized, before and after PEFT merges B @ A into it."""
    peft = importlib.import_module("peft")
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    model = nn.Sequential(bitsandbytes_layer(dense))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # as transformers' models say, or PEFT does not see it
    before = values_of_bitsandbytes(model[0])
    rank = len(lora_a)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]))
    layer = adapted.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(lora_a)
    layer.lora_B["default"].weight.data.copy_(lora_b)
    layer.merge()
    return before, values_of_bitsandbytes(layer.base_layer)


def values_of_bitsandbytes(layer: Any) -> Tensor:
    """Return the dequantized weight of bitsandbytes' 4-bit layer, fp32."""
    functional = importlib.import_module("bitsandbytes.functional")
    values: Tensor = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return values.float()


def dequantized_by_torchao(weight: Tensor) -> Callable[[], Any]:
    """Return a call that dequantizes the weight."""
    packed = _nf4().to_nf4(weight, NF4_BLOCK, NF4_SCALER_BLOCK)
    dequantize = _faster(_get_original_weight)
    return lambda: dequantize(packed)


def quantized_by_torchao(weight: Tensor) -> Callable[[], Any]:
    """Return a call that quantizes the weight."""
    quantize = _faster(_nf4().to_nf4)
    return lambda: quantize(weight, NF4_BLOCK, NF4_SCALER_BLOCK)


def torchao_layer(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return torchao's function x -> y of a frozen NF4 weight, (out, in); call this outside of inference mode."""
    module = _nf4()
    packed, linear = module.to_nf4(weight.detach(), NF4_BLOCK, NF4_SCALER_BLOCK), _faster(module.linear_nf4)
    return lambda x: linear(x, packed)


def _get_original_weight(packed: Any) -> Any:
    return packed.get_original_weight()


@cache
def _faster(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, compiled for each shape that it meets, unless `torch.compiler.set_stance` forces eager."""
    torch._dynamo.config.recompile_limit = 64  # the default of 8 is fewer than the shapes of one measurement
    return torch.compile(function, dynamic=False)


@cache
def _nf4() -> Any:
    """Import torchao's NF4 without its log about libraries for other processors and its warning about caching."""
    warnings.filterwarnings("ignore", message="NF4Tensor does not implement _stable_hash_for_caching")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return importlib.import_module(_NF4_MODULE)
    finally:
        logging.disable(before)
