"""Adapters: configuration, attaching and switching, PEFT's files."""

from .adapter_folder import AdapterFolder, AdapterLayer, find_adapter_folder, read_adapter_folder
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
from .combine import CombineConfig, combine_adapters, combine_folders
from .config import LoraConfig
from .exports import export_adapter
from .host_memory import offload_adapter, onload_adapter
from .hot_swap import swap_adapter
from .merge import merge_adapter, unmerge_adapter
from .merge_report import LayerMerge, MergeReport
from .merged_export import merge_checkpoint
from .peft_config import read_adapter_config
from .peft_files import load_adapter, save_adapter
from .resize import ResizeConfig, resize_adapter, resize_folder
from .status import AdapterStatus, AdapterSummary, adapter_status
from .switching import idle_adapters, use_rows
from .targeting import MatchReport
from .update_report import LayerChange, UpdateReport

__all__ = [
    "AdapterFolder",
    "AdapterLayer",
    "AdapterStatus",
    "AdapterSummary",
    "CombineConfig",
    "LayerChange",
    "LayerMerge",
    "LoraConfig",
    "MatchReport",
    "MergeReport",
    "ResizeConfig",
    "UpdateReport",
    "adapter_configs",
    "adapter_parameters",
    "adapter_parts",
    "adapter_status",
    "add_adapter",
    "combine_adapters",
    "combine_folders",
    "count_parameters",
    "disable_adapters",
    "export_adapter",
    "find_adapter_folder",
    "idle_adapters",
    "load_adapter",
    "lora_layers",
    "merge_adapter",
    "merge_checkpoint",
    "offload_adapter",
    "onload_adapter",
    "read_adapter_config",
    "read_adapter_folder",
    "remove_adapter",
    "resize_adapter",
    "resize_folder",
    "save_adapter",
    "set_adapter",
    "set_trained",
    "swap_adapter",
    "unmerge_adapter",
    "use_rows",
]
