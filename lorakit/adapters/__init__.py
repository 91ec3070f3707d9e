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
)
from .config import LoraConfig
from .peft_files import load_adapter, read_adapter_config, save_adapter
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
    "load_adapter",
    "lora_layers",
    "read_adapter_config",
    "read_adapter_folder",
    "remove_adapter",
    "save_adapter",
    "set_adapter",
]
