"""The starts, the first values of an adapter: one file and one line in `STARTS` for each.

`AdaptedLayer.add` draws A and B; `add_adapter` then runs the start on them. The config, PEFT's files, merging, the
planner and inspection ask the `Start` for whatever they need to know about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ...errors import AdapterError, ConfigError, did_you_mean
from .eva import EVA
from .gaussian import Gaussian
from .kaiming import Kaiming, RandomKaiming
from .loftq import LoftQ
from .lora_ga import LoRAGA
from .milora import MiLoRA
from .olora import OLoRA
from .orthogonal import Orthogonal
from .pissa import Pissa, RandomizedPissa
from .start import Start, StartData

__all__ = ["STARTS", "Start", "StartData", "changed_base_in_peft", "find_start", "start_data", "start_names"]

STARTS: dict[bool | str, Start] = {  # the values that `init_lora_weights` takes
    True: Kaiming(),
    False: RandomKaiming(),
    "gaussian": Gaussian(),
    "orthogonal": Orthogonal(),
    "pissa": Pissa(),
    "pissa_niter_N": RandomizedPissa(),
    "milora": MiLoRA(),
    "olora": OLoRA(),
    "loftq": LoftQ(),
    "eva": EVA(),
    "lora_ga": LoRAGA(),
}
_CHANGED_BASE_IN_PEFT_ALONE = ("corda",)  # starts of PEFT that lorakit does not have


def find_start(value: bool | str) -> Start:
    """Return the start that a value of `init_lora_weights` names; the case of letters does not matter.

    The texts "true" and "false" stand for True and False, as in a recipe that quotes them.

    Raises:
        ConfigError: there is none of that name.
    """
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value.lower())
    named = next((start for entry in STARTS.values() if (start := entry.named(value)) is not None), None)
    if named is None:
        names = start_names()
        raise ConfigError(f"'{value}' is not a start{did_you_mean(str(value), names)} (known: {', '.join(names)})")
    return named


def start_names(*, in_base: bool = False) -> list[str]:
    """Return the starts' names as recipes spell them.

    Args:
        in_base: True returns only the starts inside the base weight.
    """
    names = (name for name, start in STARTS.items() if start.in_base or not in_base)
    return [name if isinstance(name, str) else str(name).lower() for name in names]


def changed_base_in_peft(value: object) -> bool:
    """Return whether PEFT moves a part of the base into the adapter for this `init_lora_weights` of a file.

    Such a file fits only the changed base model, which is lost.
    """
    names = [str(name) for name, start in STARTS.items() if start.peft_changes_base]
    return isinstance(value, str) and value.lower().startswith((*names, *_CHANGED_BASE_IN_PEFT_ALONE))


def start_data(start: Start, losses: Iterable[Tensor] | None, sources: Mapping[str, Tensor] | None) -> StartData:
    """Return the data for a start, which must be exactly what it needs.

    Args:
        losses: one scalar for each batch.
        sources: "<path of the layer>.weight" -> the weight before quantization, (out_features, in_features) or as the
            layer shapes it.

    Raises:
        AdapterError: the start needs losses or sources and there are none, or there are some and it needs none.
    """
    for name, data in (("losses", losses), ("sources", sources)):
        if start.needs == name and data is None:
            raise AdapterError(f"init_lora_weights '{start.name}' needs `{name}`; give them to add_adapter")
        if start.needs != name and data is not None:
            raise AdapterError(f"`{name}` were given, but init_lora_weights {start.name!r} makes no use of them")
    return StartData(() if losses is None else losses, {} if sources is None else sources)
