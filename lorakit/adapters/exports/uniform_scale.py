"""One scale and one rank for all layers: the part of PEFT's format that all its readers understand in the same way.

    B <- scaling * B,   A and B padded with zeros to the highest rank R,   r = lora_alpha = R

so lora_alpha / r is 1, whether a reader takes r from the config or from A, without patterns or use_rslora. The zeros
add nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ..peft.folder import write_adapter_folder
from ..peft.names import matrix_names
from .export import Export, folded

Matrices = dict[str, tuple[Tensor, Tensor]]  # module path -> A (R, in), B (out, R)


def uniform(export: Export) -> Matrices:
    """Return the layers' A and B for a scale of 1, all padded to the highest rank among them."""
    matrices = folded(export, {path: layer.scaling for path, layer in export.layers.items()})
    rank = max(len(a) for a, _ in matrices.values())
    return {path: (pad(a, (0, 0, 0, rank - len(a))), pad(b, (0, rank - len(a)))) for path, (a, b) in matrices.items()}


def write_uniform(path: Path, export: Export, matrices: Matrices, **changes: Any) -> None:
    """Write the adapter folder of `uniform`'s matrices; `changes` are further settings of its config."""
    tensors = {}
    for name, (a, b) in matrices.items():
        is_embedding = name in export.layers and export.layers[name].kind == "embedding"
        for tensor_name, matrix in zip(matrix_names(name, is_embedding), (a, b), strict=True):
            tensors[tensor_name] = matrix.contiguous()
    rank = len(next(iter(matrices.values()))[0])
    plain = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    write_adapter_folder(path, tensors, {**export.config, **plain, **changes})
