"""Export for TGI (text-generation-inference): one scale for all layers, and no layer left out.

TGI reads the scale as vLLM does and stacks the matrices of one projection over all layers. If a projection has no
adapter in one layer, TGI silently drops it in every layer; it also drops modules that it does not know. So layers
without an adapter get zeros.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from .base_config import base_size
from .export import Export, check_plain
from .uniform_scale import Matrices, uniform, write_uniform

_KNOWN = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)|lm_head")
_NUMBER = re.compile(r"\.layers\.(\d+)\.")


def export_tgi(export: Export, path: Path) -> None:
    """Write the folder, with scale 1 and the highest rank in every layer, and zeros for missing layers.

    Raises:
        AdapterError: the adapter holds more than A and B of the projections that TGI adapts.
        CheckpointError: the base model's number of layers is not known.
    """
    unknown = [
        f"{name}: TGI adapts no such module and would leave it out"
        for name, layer in export.layers.items()
        if layer.kind != "linear" or not _KNOWN.fullmatch(name)
    ]
    check_plain(export, "TGI", *unknown)
    matrices = uniform(export)
    if missing := _missing(matrices, base_size(export.base(), "num_hidden_layers")):
        names = {"target_modules": [*matrices, *missing], "layers_to_transform": None, "exclude_modules": None}
        write_uniform(path, export, matrices | missing, **names)
    else:
        write_uniform(path, export, matrices)


def _missing(matrices: Matrices, layers: int) -> Matrices:
    """Return zeros for each layer in which a projection that is adapted elsewhere has no adapter."""
    missing: Matrices = {}
    for name, (a, b) in matrices.items():
        for number in range(layers if "." in name else 0):
            other = _NUMBER.sub(f".layers.{number}.", name)
            if other not in matrices:
                missing[other] = (torch.zeros_like(a), torch.zeros_like(b))
    return missing
