"""LoRA and QLoRA written out in full in PyTorch: readable, exact to the bit, open to inspection."""

import lorakit_kernels  # noqa: F401 - first: it sets what PyTorch's CPU libraries read when they load

from .adapters import (
    LoraConfig,
    MergeReport,
    adapter_parameters,
    adapter_status,
    add_adapter,
    disable_adapters,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    set_adapter,
    set_trained,
    swap_adapter,
    unmerge_adapter,
    use_rows,
)
from .data import Record, load_records, save_records
from .errors import LorakitError
from .inspection import AdapterInfo, inspect_adapter
from .layers import Linear4bit, LoRALinear
from .models import Decoder, Tokenizer, generate, load_model, load_tokenizer
from .planning import Plan, plan
from .quantization import QuantizedWeight, quantize
from .training import TrainConfig, TrainResult, train

__all__ = [
    "AdapterInfo",
    "Decoder",
    "Linear4bit",
    "LoRALinear",
    "LoraConfig",
    "LorakitError",
    "MergeReport",
    "Plan",
    "QuantizedWeight",
    "Record",
    "Tokenizer",
    "TrainConfig",
    "TrainResult",
    "adapter_parameters",
    "adapter_status",
    "add_adapter",
    "disable_adapters",
    "generate",
    "inspect_adapter",
    "load_adapter",
    "load_model",
    "load_records",
    "load_tokenizer",
    "merge_adapter",
    "plan",
    "quantize",
    "remove_adapter",
    "save_adapter",
    "save_records",
    "set_adapter",
    "set_trained",
    "swap_adapter",
    "train",
    "unmerge_adapter",
    "use_rows",
]
