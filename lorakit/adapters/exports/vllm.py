"""Export for vLLM: PEFT's format with one scale for all layers.

vLLM multiplies B @ A of every layer by the config's lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. It ignores
rank_pattern and alpha_pattern, so layers that match them would silently get a wrong scale. vLLM itself refuses layers
that it cannot adapt and ranks over its --max-lora-rank (16 by default).
"""

from __future__ import annotations

from pathlib import Path

from .export import Export, check_plain
from .uniform_scale import uniform, write_uniform


def export_vllm(export: Export, path: Path) -> None:
    """Write the folder, with scale 1 and the highest rank in every layer.

    Raises:
        AdapterError: the adapter holds more than A and B of linear layers and embeddings.
    """
    check_plain(export, "vLLM")
    write_uniform(path, export, uniform(export))
