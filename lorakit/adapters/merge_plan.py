"""Working out a merge: every new weight and the report, before anything in the model changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..layers import AdaptedLayer, Embedding4bit, Linear4bit, ResidualLinear4bit
from ..layers.quantized_module import QuantizedModule, frozen
from ..models.checkpoint import Checkpoint
from ..quantization import QuantizedWeight
from ..quantization.policy import WeightFormat
from .attach import lora_layers
from .merge_base import Base, WrongBase, open_base, weight_from
from .merge_report import LEAST_SHARE, LayerMerge, MergeReport
from .merge_weights import MergedWeight, Update, least_rank, merged_4bit, merged_4bit_with_residual, merged_dense


@dataclass
class Swap:
    """One layer's exchange.

    Attributes:
        path: of the layer.
        layer: the adapted layer.
        old, new: its base layer before and after; the same module where only its weight is exchanged.
        weights: (before, after) in that case.
        parts: paths of other modules that hold the old weight too, and will go on holding it.
        parked: adapter name -> what the layer held of it, while the merge lasts.
    """

    path: str
    layer: AdaptedLayer
    old: nn.Module
    new: nn.Module
    weights: tuple[nn.Parameter, nn.Parameter] | None = None
    parts: tuple[str, ...] = ()
    parked: dict[str, dict[str, Any]] = field(default_factory=dict)


@torch.no_grad()
def plan_merge(
    model: nn.Module, names: Sequence[str], base: Base, quantize: bool, residual_rank: int | None
) -> tuple[list[Swap], MergeReport]:
    """Compute the merged layers; arguments and errors as `merge_adapter`."""
    layers = {path: layer for path, layer in lora_layers(model).items() if set(names) & set(layer.names())}
    plan = _Plan(layers, tuple(names), quantize, residual_rank, _float_dtype(model))
    plan.check()
    notes: list[str] = []
    source = None
    if base is not None or any(isinstance(layer.base_layer, QuantizedModule) for layer in layers.values()):
        source = open_base(model, base)
    try:
        swaps, report = plan.make(source, notes)
    except WrongBase as error:
        if base is not None:
            raise
        notes.append(f"not merged onto the checkpoint that the model was loaded from: {error}")
        swaps, report = plan.make(None, notes)
    for swap in swaps:
        swap.parts = _other_holders(model, swap)
        if swap.parts:
            notes.append(f"{swap.path} shared its weight with {', '.join(swap.parts)}, and has its own from now on")
    return swaps, report


@dataclass(frozen=True)
class _Plan:
    layers: dict[str, AdaptedLayer]
    names: tuple[str, ...]
    quantize: bool
    residual_rank: int | None
    dtype: torch.dtype  # of what was in 4 bits and becomes dense

    def check(self) -> None:
        """Refuse what cannot be right, whatever the numbers."""
        for path, layer in self.layers.items():
            staying = [name for name in layer.names() if name not in self.names]
            for name in staying:
                if layer.variants[name].gain(layer, name, torch.float32) is not None:
                    raise AdapterError(
                        f"{path}: the adapter '{name}' scales the rows of the weight, and would scale the merged "
                        f"update too; merge it together with {', '.join(self.names)}, or remove it first"
                    )
            if self.quantize and isinstance(layer.base_layer, ResidualLinear4bit):
                raise AdapterError(
                    f"{path} holds the low-rank part of an earlier merge for good; it can be merged into with "
                    f"quantize=False only"
                )

    def make(self, source: Checkpoint | None, notes: list[str]) -> tuple[list[Swap], MergeReport]:
        """Compute all layers, onto the source's weights where there is one."""
        swaps, report = [], MergeReport(self.names, [], None if source is None else source.folder, notes)
        refused = []
        for path, layer in self.layers.items():
            update = Update.of(layer, [name for name in self.names if name in layer.names()])
            device = update.dense.device
            origin = None if source is None else weight_from(source, path, layer, device)
            merged, base = self._merged(path, layer, update, origin)
            swap = _swap(path, layer, merged)
            swaps.append(swap)
            before, after = _nbytes(layer.base_layer), merged.nbytes
            rank = merged.residual.rank if merged.residual else 0
            entry = LayerMerge.measure(path, merged.how, base, update.dense, merged.real, (before, after), rank)
            report.layers.append(entry)
            if merged.limited and entry.share < LEAST_SHARE:
                refused.append(f"{path}: {entry.share:.3f}, needs rank {least_rank(update.low_rank, LEAST_SHARE)}")
        if refused:
            more = f"\n  (+{len(refused) - 10} more)" if len(refused) > 10 else ""
            raise AdapterError(
                f"at residual_rank={self.residual_rank} less than {LEAST_SHARE} of the update would survive in 4 bits:"
                "\n  " + "\n  ".join(refused[:10]) + more + "\nGive a 16-bit base, a higher residual_rank, or "
                "quantize=False"
            )
        return swaps, report

    def _merged(
        self, path: str, layer: AdaptedLayer, update: Update, origin: Tensor | None
    ) -> tuple[MergedWeight, Tensor]:
        """Return the merged weight of a layer, and the base that the update was added to."""
        module, wide = layer.base_layer, update.dense.dtype
        own = module.quantized if isinstance(module, QuantizedModule) else None
        base = layer.base_weight(wide) if origin is None else origin.to(wide)
        if own is None:
            merged = merged_dense(base, update.dense, cast(Tensor, module.weight).dtype, "weight + update")
        elif not self.quantize:
            how = "16-bit base + update" if origin is not None else "dequantized + update"
            merged = merged_dense(base, update.dense, self.dtype, how)
        elif origin is not None:
            form = WeightFormat(own.quant_type, own.block_size, own.double_quant)
            merged = merged_4bit(base, update.dense, form, own.dtype, "4 bits of base + update")
        elif not isinstance(module, Linear4bit):
            raise AdapterError(
                f"{path}: a {type(module).__name__} cannot hold a low-rank part beside its 4 bits; give a 16-bit base, "
                "or quantize=False"
            )
        else:
            merged = merged_4bit_with_residual(own, update, self.residual_rank, self.dtype)
        values = merged.weight.absmax if isinstance(merged.weight, QuantizedWeight) else merged.weight
        if not torch.isfinite(values).all() or not torch.isfinite(merged.real).all():
            raise AdapterError(f"{path}: the merged weight would hold inf or nan in {_dtype_of(merged)}")
        return merged, base


def _swap(path: str, layer: AdaptedLayer, merged: MergedWeight) -> Swap:
    """Return the exchange of a layer's base for one that holds the merged weight."""
    old = layer.base_layer
    if not isinstance(old, QuantizedModule):
        assert isinstance(merged.weight, Tensor)  # a dense layer stays dense
        before = cast(nn.Parameter, old.weight)
        return Swap(path, layer, old, old, (before, frozen(merged.weight)))
    new: nn.Module
    if isinstance(old, Linear4bit):
        new = _linear(old, merged)
    elif isinstance(merged.weight, QuantizedWeight):
        new = Embedding4bit(merged.weight, cast(Embedding4bit, old).dtype, old.packed.dtype)
    else:
        new = nn.Embedding.from_pretrained(merged.weight.to(cast(Embedding4bit, old).dtype), freeze=True)
    return Swap(path, layer, old, new.train(old.training))


def _linear(old: Linear4bit, merged: MergedWeight) -> nn.Module:
    if isinstance(merged.weight, QuantizedWeight):
        rest = (old.bias, old.compute_dtype, old.packed.dtype)
        if merged.residual is None:
            new: nn.Module = Linear4bit(merged.weight, *rest)
        else:
            new = ResidualLinear4bit(merged.weight, merged.residual.up, merged.residual.down, *rest)
    else:
        new = dense_linear(merged.weight, old.bias)
    if old.bias is not None and new.bias.dtype == old.bias.dtype:
        new.bias = old.bias  # the very parameter: it moves with the model, and is there when the old layer comes back
    return new


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a frozen nn.Linear that holds a weight; it is made small, since its own start is thrown away."""
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(1, 1, bias=False)
    layer.out_features, layer.in_features = weight.shape
    layer.weight = frozen(weight)
    if bias is not None:
        layer.bias = frozen(bias.to(weight.dtype))
    return layer


def _float_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that a model computes in: its own word for it, or that of its first weight not in 4 bits."""
    said = getattr(model, "dtype", None)
    if isinstance(said, torch.dtype) and said.is_floating_point:
        return said
    quantized = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    own = [tensor for module in quantized for tensor in module.parameters()]
    own += [
        tensor
        for part in lora_layers(model).values()
        for name in part.names()
        for tensor in part.parameters_of(name).values()
    ]
    skipped = {id(tensor) for tensor in own}
    found = (tensor.dtype for tensor in model.parameters() if id(tensor) not in skipped and tensor.is_floating_point())
    return next(found, quantized[0].source_dtype if quantized else torch.float32)


def _other_holders(model: nn.Module, swap: Swap) -> tuple[str, ...]:
    """Return the paths of modules that share a dense layer's weight, as a tied output head does."""
    if swap.weights is None:
        return ()
    return tuple(
        path
        for path, module in model.named_modules()
        if module is not swap.old and any(own is swap.weights[0] for own in module._parameters.values())
    )


def _nbytes(module: nn.Module) -> int:
    """Bytes of a layer's weight as it is held."""
    if isinstance(module, ResidualLinear4bit):
        return module.quantized.nbytes + module.residual_up.nbytes + module.residual_down.nbytes
    weight = module.quantized if isinstance(module, QuantizedModule) else cast(Tensor, module.weight)
    return weight.nbytes


def _dtype_of(merged: MergedWeight) -> str:
    dtype = merged.weight.dtype
    return str(dtype).removeprefix("torch.")
