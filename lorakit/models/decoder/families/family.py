"""`Family`: everything that sets a model family apart from the shared decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ....layers import RMSNorm
from ..blocks import MLP, Attention


@dataclass(frozen=True)
class GGUFForm:
    """How llama.cpp stores a family's models.

    Attributes:
        architecture: its name there, "general.architecture" of the file.
        permutes_qk: whether the rows of the q and k projections are in another order there (`gguf_rows`).
        is_imported: whether `import_gguf` makes a checkpoint of this family from such a file.
    """

    architecture: str
    permutes_qk: bool = False
    is_imported: bool = False


@dataclass(frozen=True)
class Family:
    """A model family: its names, how its config.json is read, and its own blocks.

    Attributes:
        architecture: the name in config.json's "architectures".
        model_type: "model_type" of the same file.
        switches: config.json's values -> the fields of `DecoderShape` that this family sets differently from
            `DecoderConfig.from_dict`. It raises KeyError if a value is missing.
        activations: the values of "hidden_act" that mean its MLP's activation.
        gguf: its form in llama.cpp; None: it cannot be exported there.
        attention, mlp, norm: the classes of its blocks; `attention(shape, index)`, `mlp(shape)`, `norm(size, eps)`.
    """

    architecture: str
    model_type: str
    switches: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda values: {}
    activations: tuple[str, ...] = ("silu", "swish")
    gguf: GGUFForm | None = None
    attention: type[Attention] = Attention
    mlp: type[MLP] = MLP
    norm: type[RMSNorm] = RMSNorm


def sliding_window(values: Mapping[str, Any], by_default: bool) -> int | None:
    """Return config.json's sliding window, None if "use_sliding_window" switches it off or there is none.

    Args:
        by_default: whether the window counts if that key is absent.
    """
    window = values.get("sliding_window") if values.get("use_sliding_window", by_default) else None
    return None if window is None else int(window)
