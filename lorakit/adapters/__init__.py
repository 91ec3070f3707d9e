"""Adapters: configuration, attaching and switching, PEFT's files."""

from .adapter_folder import AdapterFolder, AdapterLayer, read_adapter_folder
from .attach import (
    adapter_configs,
    adapter_parameters,
    add_adapter,
    count_parameters,
    disable_adapters,
    lora_layers,
    remove_adapter,
    set_adapter,
)
from .config import LoraConfig
from .exports import export_adapter
from .peft_files import load_adapter, read_adapter_config
from .saving import save_adapter
from .targeting import MatchReport

__all__ = [
    "AdapterFolder",
    "AdapterLayer",
    "LoraConfig",
    "MatchReport",
    "adapter_configs",
    "adapter_parameters",
    "add_adapter",
    "count_parameters",
    "disable_adapters",
    "export_adapter",
    "load_adapter",
    "lora_layers",
    "read_adapter_config",
    "read_adapter_folder",
    "remove_adapter",
    "save_adapter",
    "set_adapter",
]
