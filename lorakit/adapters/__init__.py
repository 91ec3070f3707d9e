"""Adapters: configuration, attaching and switching, merging, combining, PEFT's files and exports."""

from .attach.add import adapter_parameters, add_adapter, count_parameters, remove_adapter
from .attach.host_memory import offload_adapter, onload_adapter
from .attach.state import adapter_configs, adapter_modules, lora_layers
from .attach.switching import disable_adapters, idle_adapters, set_adapter, set_trained, use_rows
from .attach.targeting import MatchReport
from .combining.combine import CombineConfig, combine_adapters, combine_folders
from .combining.report import LayerChange, UpdateReport
from .combining.resize import ResizeConfig, resize_adapter, resize_folder
from .config import LoraConfig
from .exports import export_adapter
from .load_save import load_adapter, save_adapter
from .merging.checkpoint import merge_checkpoint
from .merging.merge import merge_adapter, unmerge_adapter
from .merging.report import LayerMerge, MergeReport
from .peft.config import find_adapter_folder, read_adapter_config
from .peft.folder import AdapterFolder, AdapterLayer, read_adapter_folder
from .peft.hot_swap import swap_adapter
from .status import AdapterStatus, AdapterSummary, adapter_status

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
    "adapter_modules",
    "adapter_parameters",
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
