"""For vLLM: PEFT's format with one scale for all layers.

vLLM multiplies B @ A of every layer by lora_alpha / r of the configuration, with use_rslora by lora_alpha / sqrt(r),
and reads neither rank_pattern nor alpha_pattern: layers that these mean get a wrong scale, silently. Layers it cannot
adapt, and ranks over its --max-lora-rank (16 where it is not set), it refuses itself.
"""

from __future__ import annotations

from pathlib import Path

from .export import Export, check_plain
from .uniform_scale import uniform, write_uniform


def export_vllm(export: Export, path: Path) -> None:
    """Write the folder, every layer of scale 1 and of the highest rank.

    Raises:
        AdapterError: the adapter is more than A and B of linear layers and embeddings.
    """
    check_plain(export, "vLLM")
    write_uniform(path, export, uniform(export))
