"""The identity of a base model: samples of its weights, which rounding and quantization change only within bounds.

An adapter's file keeps a few values of every weight under it. Another model of the same shapes has other
values: another seed, a fine-tuned copy, a copy with an adapter merged into it. The same model has the same values up to
the rounding to its dtype, or lies in the cells of its 4-bit codes.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import importlib
import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.checkpoint import Checkpoint
from ...errors import CheckpointError, LorakitError
from ...files import read_json_object
from ...layers import ResidualLinear4bit, SavedModule, TiedModule
from ...layers.frozen.calls import is_dense, loaded
from ...layers.frozen.quantized_module import QuantizedModule, frozen
from ...quantization import QuantizedWeight
from ...quantization.weight import SOURCE_DTYPES
from ..attach.targeting import unwrapped
from ..attach.ties import named_embedding
from ..attach.wrappers import inner_module, whole
from .names import BASE_KEY, BASE_SAMPLE_KEY
from .samples import WeightSample, sample_4bit, sample_dense

_UNRELATED = 0.5  # two weights that have nothing to do with each other have a cosine of 0, with a deviation of 1/8
_MOST_NEW = 0.25  # largest share of a model's weights that can be a new head


def base_names(model: nn.Module) -> Iterator[str]:
    """Yield the folder or name from which a model, lorakit's or one of transformers, was loaded; it may be ""."""
    for name in (getattr(model, "folder", None), getattr(getattr(model, "config", None), "_name_or_path", None)):
        if name is not None:
            yield str(name)


def vocabulary_of_checkpoint(model: nn.Module) -> int | None:
    """Return the number of tokens of the checkpoint that a model was loaded from; None if that cannot be found out."""
    for name in base_names(model):
        file = Path(name) / "config.json" if name else None
        if file is not None and not file.is_file():
            file = _in_hub_cache(name)
        if file is None:
            continue
        try:
            values: dict[str, Any] = read_json_object(file)
        except LorakitError:
            continue
        size = values.get("vocab_size") or (values.get("text_config") or {}).get("vocab_size")
        return size if isinstance(size, int) else None
    return None


def _in_hub_cache(name: str) -> Path | None:
    """Return the config of a model of the Hugging Face hub if transformers has it on disk; nothing is downloaded."""
    try:
        found = importlib.import_module("huggingface_hub").try_to_load_from_cache(name, "config.json")
    except Exception:  # the package is absent, or the name is none of the hub's
        return None
    return Path(found) if isinstance(found, str) else None


@dataclass(frozen=True)
class BaseSample:
    """Samples of a base model's weights, name -> sample."""

    weights: Mapping[str, WeightSample]

    def to_metadata(self) -> dict[str, str]:
        """Return the sample as an entry of a safetensors file's metadata; an empty sample gives none."""
        if not self.weights:
            return {}
        heads = {name: [one.form, list(one.shape), one.dtype] for name, one in sorted(self.weights.items())}
        values = b"".join(self.weights[name].to_bytes() for name in heads)
        text = json.dumps({"weights": heads, "values": base64.b64encode(values).decode()}, separators=(",", ":"))
        return {BASE_SAMPLE_KEY: text}

    @staticmethod
    def from_metadata(metadata: Mapping[str, str], file: Path) -> BaseSample | None:
        """Read the entry of a file's metadata; None if there is none.

        Raises:
            CheckpointError: it is malformed.
        """
        if BASE_SAMPLE_KEY not in metadata:
            return None
        try:
            content = json.loads(metadata[BASE_SAMPLE_KEY])
            values = base64.b64decode(content["values"], validate=True)
            weights = {}
            for name, (form, shape, dtype) in content["weights"].items():
                weights[name], values = WeightSample.from_bytes(form, tuple(map(int, shape)), dtype, values)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CheckpointError(f"{file}: its metadata {BASE_SAMPLE_KEY} cannot be read; remove it") from None
        return BaseSample(weights)

    def differing(self, other: BaseSample) -> list[str]:
        """Return the weights that both models have in one shape, with values that are not those of one model."""
        return [name for name in self._common(other) if not self.weights[name].agrees(other.weights[name])]

    def is_of(self, other: BaseSample, adapted: Collection[str]) -> bool:
        """Return whether two samples are of one model. A few new weights, such as a new head, are only warned of.

        Args:
            adapted: paths of the modules that an adapter changes, which are never new.
        """
        differing = self.differing(other)
        new = {name.rpartition(".")[0] for name in differing if self._is_unrelated(other, name)} - set(adapted)
        if any(name.rpartition(".")[0] not in new for name in differing) or len(differing) > _MOST_NEW * len(
            self._common(other)
        ):
            return False
        if differing:
            warnings.warn(
                f"the adapter was trained with other numbers in {_listed(differing)} of the base model; if these start "
                "at random, train and save them too with modules_to_save",
                stacklevel=3,
            )
        return True

    def _common(self, other: BaseSample) -> list[str]:
        shapes = {name: sample.shape for name, sample in other.weights.items()}
        return [name for name, sample in self.weights.items() if shapes.get(name) == sample.shape]

    def _is_unrelated(self, other: BaseSample, name: str) -> bool:
        if len(self.weights[name].shape) < 2:  # a norm, or a bias: new ones hold constants
            return False
        ours, theirs = self.weights[name].values.double(), other.weights[name].values.double()
        return float(2 * ours @ theirs) <= _UNRELATED * float(ours @ ours + theirs @ theirs)


def sample_model(home: nn.Module, name: str | None = None) -> BaseSample:
    """Return samples of a model's weights without its adapters, active or merged.

    Adapters merged with reversible=False cannot be told from the weights, so these count as another model's.

    Args:
        name: an adapter. Weights that it replaces by copies of its own do not count.
    """
    weights: dict[str, WeightSample] = {}
    vocabulary = vocabulary_of_checkpoint(home)
    tables = {named_embedding(home, method) for method in ("get_input_embeddings", "get_output_embeddings")}
    for path, module, weight in _weights(home, "", name, _unmerged(home)):
        if module in tables and isinstance(weight, Tensor) and vocabulary is not None:
            weight = weight[:vocabulary]  # the rows of a resized vocabulary are in no checkpoint
        sample = sample_4bit(weight) if isinstance(weight, QuantizedWeight) else sample_dense(weight)
        if sample is not None:
            weights[path] = sample
    return BaseSample(weights)


def sample_checkpoint(checkpoint: Checkpoint, like: BaseSample) -> BaseSample:
    """Return samples of those of a checkpoint's tensors that another sample has, in its shapes."""
    weights: dict[str, WeightSample] = {}
    for name, sample in like.weights.items():
        if name in checkpoint and checkpoint.shape(name) == sample.shape and checkpoint.dtype(name) in SOURCE_DTYPES:
            own = sample_dense(checkpoint.read(name))
            assert own is not None  # it is in memory, and of a dtype that is sampled
            weights[name] = own
    return BaseSample(weights)


def check_trained_on(home: nn.Module, metadata: Mapping[str, str], adapted: Collection[str], folder: Path) -> None:
    """Raise CheckpointError if an adapter's file says that it was trained on another base model.

    Args:
        home: the model.
        metadata: of the file.
        adapted: paths of the modules that the adapter adapts.
        folder: of the adapter, for the message.
    """
    trained_on, old = BaseSample.from_metadata(metadata, folder), metadata.get(BASE_KEY)
    if trained_on is not None:
        here = sample_model(home)
        is_other = not trained_on.is_of(here, adapted)
        which = f"the weights {_listed(trained_on.differing(here))} differ" if is_other else ""
    else:
        is_other = old is not None and old != base_fingerprint(home)
        which = "its norms and biases differ"
    if is_other:
        raise CheckpointError(
            f"{folder} was trained on another base model of the same shapes: {which}; load it with check_base=False if "
            "you want it on this model all the same"
        )


def check_checkpoint(checkpoint: Checkpoint, trained_on: BaseSample | None, adapted: Collection[str], of: str) -> None:
    """Raise CheckpointError if a checkpoint does not hold the model that was sampled.

    Args:
        adapted: paths of the modules that an adapter adapts.
        of: what was sampled, as the subject of the message.
    """
    if trained_on is None:
        return
    here = sample_checkpoint(checkpoint, trained_on)
    if not trained_on.is_of(here, adapted):
        raise CheckpointError(
            f"{checkpoint.folder} is not the base model of {of}: its weights {_listed(trained_on.differing(here))} "
            "hold other numbers"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True)
class _Unmerged:
    """What a merge replaced: module -> the one before, (module, name) -> the parameter before. `seen` are modules."""

    modules: dict[nn.Module, nn.Module]
    parameters: dict[tuple[nn.Module, str], nn.Parameter | None]
    seen: set[nn.Module] = field(default_factory=set)


def _unmerged(home: nn.Module) -> _Unmerged:
    merge = vars(home).get("lora_merged")  # merging is a room above this one
    swaps = getattr(merge, "swaps", ())
    # The last one counts: of a parameter that a merge replaced and then parted, that is the one before both.
    exchanges = [*getattr(merge, "parted", ()), *(exchange for swap in swaps for exchange in swap.exchanges)]
    return _Unmerged({swap.new: swap.old for swap in swaps}, {(one.module, one.name): one.before for one in exchanges})


def _weights(
    module: nn.Module, path: str, adapter: str | None, unmerged: _Unmerged
) -> Iterator[tuple[str, nn.Module, Tensor | QuantizedWeight]]:
    """Yield the weights of a module and those inside it, without adapters: name in the base, module, weight.

    Codes of other libraries are left out. What accelerate keeps elsewhere is loaded, one module at a time.
    """
    own: Collection[str] = ()
    base = inner_module(module)
    while (inner := inner_module(unwrapped(base))) is not base:
        if isinstance(base, SavedModule) and adapter in base.names():
            own = {*own, *base.parameters_of(adapter)}
        if isinstance(base, TiedModule) and adapter in base.names():
            own = {*own, *base.sources(adapter)}
        base = inner
    if base in unmerged.seen:
        return
    unmerged.seen.add(base)
    base = unmerged.modules.get(base, base)
    with loaded(base):
        parameters = _own_weights(base)
    for name, parameter in parameters.items():
        parameter = unmerged.parameters.get((base, name), parameter)
        if isinstance(parameter, QuantizedWeight):
            yield f"{path}{name}", base, parameter
        elif is_dense(parameter) and name not in own:
            yield f"{path}{name}", base, whole(parameter.detach())
    for name, child in base._modules.items():
        if child is not None:
            yield from _weights(child, f"{path}{name}.", adapter, unmerged)


def _own_weights(base: nn.Module) -> dict[str, Any]:
    """Return the weight and the bias of a layer in 4 bits, and all parameters of another module."""
    if not isinstance(base, QuantizedModule):
        return dict(base._parameters)
    if any(hasattr(parameter, "device_mesh") for parameter in base.parameters(recurse=False)):
        divided, base = base, copy.copy(base)
        base._parameters = {name: frozen(whole(p)) for name, p in divided._parameters.items() if p is not None}
    weight = base.dense_weight(torch.float32) if isinstance(base, ResidualLinear4bit) else base.quantized
    return {"weight": weight} | {name: p for name, p in base._parameters.items() if name == "bias"}


def base_fingerprint(model: nn.Module) -> str | None:
    """Return the fingerprint in older files: a hash of a model's vectors with their names, or None without a vector."""
    digest, count = hashlib.sha256(), 0
    for name, _, vector in _weights(model, "", None, _unmerged(model)):
        if isinstance(vector, Tensor) and vector.ndim == 1 and vector.is_floating_point():
            digest.update(f"{name} {len(vector)} ".encode())
            digest.update(vector.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
            count += 1
    return digest.hexdigest() if count else None
