"""Adapters: configuration, attaching and switching, PEFT's files."""

from .adapter_folder import AdapterFolder, AdapterLayer, read_adapter_folder
from .attach import (
    adapter_configs,
    adapter_parameters,
    adapter_parts,
    add_adapter,
    count_parameters,
    disable_adapters,
    lora_layers,
    remove_adapter,
    set_adapter,
    set_trained,
)
from .config import LoraConfig
from .host_memory import offload_adapter, onload_adapter
from .peft_config import read_adapter_config
from .peft_files import load_adapter, save_adapter
from .switching import idle_adapters, use_rows
from .targeting import MatchReport

__all__ = [
    "AdapterFolder",
    "AdapterLayer",
    "LoraConfig",
    "MatchReport",
    "adapter_configs",
    "adapter_parameters",
    "adapter_parts",
    "add_adapter",
    "count_parameters",
    "disable_adapters",
    "idle_adapters",
    "load_adapter",
    "lora_layers",
    "offload_adapter",
    "onload_adapter",
    "read_adapter_config",
    "read_adapter_folder",
    "remove_adapter",
    "save_adapter",
    "set_adapter",
    "set_trained",
    "use_rows",
]
