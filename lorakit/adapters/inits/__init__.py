"""The values an adapter starts from, one file each; a new one is a file and a line in the table.

Plain LoRA's own start, A Kaiming-uniform and B zero, is `AdaptedLayer.add`; these give other values to A and B of an
adapter that was attached so. None of them writes to the base: a start inside the base weight is subtracted again by
the variant `residual`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from ...errors import AdapterError
from ...layers import AdaptedLayer
from ..config import LoraConfig
from .eva import eva
from .gaussian import gaussian
from .loftq import loftq
from .lora_ga import lora_ga
from .olora import olora
from .orthogonal import orthogonal
from .pissa import pissa

__all__ = ["FROM_DATA", "INITS", "find_init"]

Init = Callable[[AdaptedLayer, str], None]  # sets lora_A and lora_B of one layer's adapter
FromData = Callable[[Mapping[str, AdaptedLayer], str, Iterable[Tensor]], None]  # of all layers at once

INITS: dict[str, Init] = {
    "gaussian": gaussian,
    "olora": olora,
    "orthogonal": orthogonal,
    "pissa": pissa,
}
FROM_DATA: dict[str, FromData] = {
    "eva": eva,
    "lora_ga": lora_ga,
}


def find_init(
    config: LoraConfig, losses: Iterable[Tensor] | None, sources: Mapping[str, Tensor] | None
) -> Callable[[Mapping[str, AdaptedLayer], str], None] | None:
    """Return what gives an adapter its first values, or None where those of `AdaptedLayer.add` stay.

    Raises:
        AdapterError: the start needs losses or sources and there are none, or there are and it needs none.
    """
    init = config.init_lora_weights
    for given, what, is_needed in ((losses, "losses", init in FROM_DATA), (sources, "sources", init == "loftq")):
        if is_needed and given is None:
            raise AdapterError(f"init_lora_weights '{init}' needs `{what}`; give them to add_adapter")
        if given is not None and not is_needed:
            raise AdapterError(f"`{what}` were given, but init_lora_weights {init!r} makes no use of them")
    if isinstance(init, bool):
        return None
    if losses is not None:
        return partial(_from_data, FROM_DATA[init], losses)
    if sources is not None:
        return partial(_from_sources, sources)
    one = partial(pissa, iterations=int(init.split("_")[-1])) if init.startswith("pissa_niter_") else INITS[init]
    return partial(_each, one)


def _from_sources(sources: Mapping[str, Tensor], layers: Mapping[str, AdaptedLayer], name: str) -> None:
    for path, layer in layers.items():
        if f"{path}.weight" not in sources:
            raise AdapterError(f"`sources` has no '{path}.weight', the weight before quantization")
        loftq(layer, name, sources[f"{path}.weight"])
        layer.restart(name)


def _each(init: Init, layers: Mapping[str, AdaptedLayer], name: str) -> None:
    for layer in layers.values():
        init(layer, name)
        layer.restart(name)


def _from_data(init: FromData, losses: Iterable[Tensor], layers: Mapping[str, AdaptedLayer], name: str) -> None:
    init(layers, name, losses)
    with torch.no_grad():
        for layer in layers.values():
            layer.restart(name)
