"""Planning a merge: every new weight and the report are computed before the model changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ...checkpoints.checkpoint import Checkpoint
from ...errors import AdapterError, listing
from ...layers import (
    AdaptedLayer,
    AdapterModule,
    LoRAParameter,
    ResidualLinear4bit,
    SavedModule,
    TiedHead,
    TrainedTokens,
)
from ...layers.frozen.quantized_module import QuantizedModule, frozen
from ..attach.state import adapter_configs, adapter_modules
from ..attach.wrappers import named_modules
from .base import Base, WrongBase, open_base, weight_from
from .modules import dense_base, exchanges_weight, holder, new_base, weight_bytes
from .report import LEAST_SHARE, LayerMerge, MergeReport
from .swaps import Exchange, MergeState, Swap
from .weights import (
    MergedWeight,
    MergeUpdate,
    format_of,
    least_rank,
    merged_4bit,
    merged_4bit_with_residual,
    merged_dense,
)


@torch.inference_mode(False)
@torch.no_grad()
def plan_merge(
    model: nn.Module, names: Sequence[str], base: Base, quantize: bool, residual_rank: int | None
) -> tuple[MergeState, MergeReport]:
    """Compute the merged layers; arguments and errors as `merge_adapter`."""
    modules = {path: module for path, module in adapter_modules(model).items() if set(names) & set(module.names())}
    notes: list[str] = []
    starts = (adapter_configs(model)[name].start for name in names)
    repairing = next((start for start in starts if start.repairs_quantization), None)
    if base is None and repairing is not None:
        notes.append(f"not merged onto a 16-bit checkpoint: '{repairing.name}' starts at the error of quantizing it")
        base = False
    source = None
    if base or any(isinstance(module.base_layer, QuantizedModule) for module in modules.values()):
        source = open_base(model, base)
    plan = _MergePlan(modules, tuple(names), quantize, residual_rank, _float_dtype(model))
    try:
        swaps, report = plan.make(source, notes)
    except WrongBase as error:
        if base is not None:
            raise
        notes.append(f"not merged onto the checkpoint that the model was loaded from: {error}")
        swaps, report = plan.make(None, notes)
    untied = _newly_untied(model, swaps)
    notes += [f"{path} shared its weight with {other} and has its own from now on" for path, other in untied]
    return MergeState(tuple(names), swaps, bool(untied)), report


@dataclass(frozen=True)
class _MergePlan:
    modules: dict[str, AdapterModule]
    names: tuple[str, ...]
    quantize: bool
    residual_rank: int | None
    dtype: torch.dtype  # of weights that were in 4 bits and become dense

    def make(self, source: Checkpoint | None, notes: list[str]) -> tuple[list[Swap], MergeReport]:
        """Compute the swap of every module, from the source's weights if there is a source."""
        report = MergeReport(self.names, [], None if source is None else source.folder, notes)
        swaps, refused = [], []
        for path, module in self.modules.items():
            names = [name for name in self.names if name in module.names()]
            if isinstance(module, AdaptedLayer):
                swap, entry, is_limited = self._merge_layer(path, module, names, source)
                report.layers.append(entry)
                if is_limited and entry.share < LEAST_SHARE:
                    wanted = least_rank(MergeUpdate.of(module, names).factored()[0], LEAST_SHARE)
                    refused.append(f"{path}: {entry.share:.3f}, needs rank {wanted}")
            else:
                swap = Swap(path, module, module.base_layer, module.base_layer, _copied(path, module, names))
            swaps.append(swap)
            others = [exchange for exchange in swap.exchanges if not exchanges_weight(module, exchange)]
            report.layers += [_copy_entry(path, exchange) for exchange in others]
        if refused:
            raise AdapterError(
                f"at residual_rank={self.residual_rank} less than {LEAST_SHARE} of the update would survive in 4 bits:"
                f"{listing(refused, 10)}\nGive a 16-bit base, a higher residual_rank, or quantize=False"
            )
        _tie_heads(swaps)
        return swaps, report

    def _merge_layer(
        self, path: str, layer: AdaptedLayer, names: list[str], source: Checkpoint | None
    ) -> tuple[Swap, LayerMerge, bool]:
        """Return a layer's swap, its line in the report, and whether the residual's rank was limited."""
        self._check(path, layer)
        old, origin = layer.base_layer, None
        if source is not None and not isinstance(layer, LoRAParameter):  # its name in a checkpoint is not known
            origin = weight_from(source, path, layer)
        with dense_base(layer, origin):  # the update of some variants depends on the base weight
            update = MergeUpdate.of(layer, names)
            base = layer.base_weight(update.dense.dtype)
        if self.quantize and isinstance(old, QuantizedModule):
            merged = self._merged_4bit(path, old, update, base, is_source=origin is not None)
        else:
            merged = merged_dense(base, update.dense, *self._dense_form(layer, is_source=origin is not None))
        if not torch.isfinite(merged.real).all():
            raise AdapterError(f"{path}: the merged weight would hold inf or nan in {str(merged.weight.dtype)[6:]}")
        entry = LayerMerge.measure(
            path, merged.how, base, update.dense, merged.real, nbytes=(weight_bytes(layer), merged.nbytes),
            residual_rank=merged.residual.rank if merged.residual else 0,
        )  # fmt: skip
        swap = Swap(path, layer, old, new_base(old, merged))
        if swap.new is old:
            assert isinstance(merged.weight, Tensor)  # a dense layer stays dense
            module, name = holder(layer)
            swap.exchanges.append(Exchange(module, name, module._parameters[name], frozen(merged.weight)))
        changes = [change for name in names if (change := layer.delta_bias(name)) is not None]
        if changes:
            before = cast(nn.Parameter | None, getattr(swap.new, "bias", None))
            total = torch.stack([change.float() for change in changes]).sum(0)
            after = total.to(merged.weight.dtype) if before is None else (before.float() + total).to(before.dtype)
            swap.exchanges.append(Exchange(swap.new, "bias", before, frozen(after)))
        return swap, entry, merged.limited

    def _dense_form(self, layer: AdaptedLayer, is_source: bool) -> tuple[torch.dtype, str]:
        """Return the dtype of a merged weight in 16 or 32 bits, and how it comes about in a few words."""
        if isinstance(layer.base_layer, QuantizedModule):
            return self.dtype, "16-bit base + update" if is_source else "dequantized + update"
        module, name = holder(layer)
        return cast(Tensor, module._parameters[name]).dtype, "weight + update"

    def _merged_4bit(
        self, path: str, module: QuantizedModule, update: MergeUpdate, base: Tensor, *, is_source: bool
    ) -> MergedWeight:
        """Put an update into a layer that stays in 4 bits.

        Args:
            base: the weight, (out_features, in_features), as its 16-bit source has it if `is_source`, else dequantized.
        """
        own = module.quantized
        if is_source:
            return merged_4bit(base, update.dense, format_of(own), own.dtype, "4 bits of base + update")
        adapters = update.layer.adapters
        if others := [name for name in update.names if not adapters[name].variant.is_factored]:
            raise AdapterError(
                f"{path}: the update of '{others[0]}' is not of low rank, and 4 bits alone would lose it; give a "
                "16-bit base, or quantize=False"
            )
        if not hasattr(module, "add_residual"):
            raise AdapterError(
                f"{path}: a {type(module).__name__} cannot hold a low-rank part beside its 4 bits; give a 16-bit base, "
                "or quantize=False"
            )
        return merged_4bit_with_residual(own, update, self.residual_rank, self.dtype)

    def _check(self, path: str, layer: AdaptedLayer) -> None:
        """Raise AdapterError if a merge would be wrong whatever the weights."""
        for name in layer.names():
            if name not in self.names and layer.adapters[name].variant.multiplies_base:
                scales = layer.adapters[name].variant.scales
                raise AdapterError(
                    f"{path}: the adapter '{name}' {scales} of the weight and would scale the merged update too; "
                    f"merge it together with {', '.join(self.names)}, or remove it first"
                )
        if self.quantize and isinstance(layer.base_layer, ResidualLinear4bit):
            raise AdapterError(
                f"{path} keeps the low-rank part of an earlier merge; merge into it with quantize=False only"
            )


def _copied(path: str, module: AdapterModule, names: list[str]) -> list[Exchange]:
    """Return the exchanges of the base layer's parameters for the trained copies, or trained rows, of an adapter."""
    if isinstance(module, TiedHead):
        return []  # it follows the embedding, see `_tie_heads`
    if isinstance(module, TrainedTokens):
        return [_with_trained_rows(path, module, names)]
    assert isinstance(module, SavedModule)  # there is no other kind
    if len(names) > 1:
        raise AdapterError(f"{path}: {', '.join(names)} each have a copy of this module, and copies have no sum")
    exchanges = []
    for key, value in module.parameters_of(names[0]).items():
        owner, _, leaf = key.rpartition(".")
        inner = module.base_layer.get_submodule(owner)
        before = cast(nn.Parameter, inner._parameters[leaf])
        exchanges.append(Exchange(inner, leaf, before, frozen(value.detach().to(before.dtype, copy=True))))
    return exchanges


def _with_trained_rows(path: str, module: TrainedTokens, names: list[str]) -> Exchange:
    """Return the exchange of an embedding's table for one with the trained rows of some adapters."""
    tokens = [token for name in names for token in module.tokens[name]]
    if len(set(tokens)) < len(tokens):
        raise AdapterError(f"{path}: {', '.join(names)} train rows of the same tokens, and such rows have no sum")
    before = cast(nn.Parameter, module.base_layer._parameters["weight"])
    after = before.detach().clone()
    for name in names:
        rows = module.parameters_of(name)["trainable_tokens_delta"]
        after[torch.tensor(module.tokens[name], device=after.device)] = rows.detach().to(after)
    return Exchange(module.base_layer, "weight", before, frozen(after))


def _tie_heads(swaps: list[Swap]) -> None:
    """Give heads that follow an embedding its new weight, the same parameter, so that they stay tied."""
    after = {id(exchange.before): exchange.after for swap in swaps for exchange in swap.exchanges}
    for swap in swaps:
        if isinstance(swap.module, TiedHead):
            before = cast(nn.Parameter, swap.module.base_layer._parameters["weight"])
            if id(before) in after:
                swap.exchanges.append(Exchange(swap.module.base_layer, "weight", before, after[id(before)]))


def _copy_entry(path: str, exchange: Exchange) -> LayerMerge:
    """Return the report's line for a parameter replaced by a trained copy: all of the change survives."""
    after = exchange.after.float()
    before = torch.zeros_like(after) if exchange.before is None else exchange.before.detach().float()
    name, change = f"{path}.{exchange.name}", after - before
    nbytes = (0 if exchange.before is None else exchange.before.nbytes, exchange.after.nbytes)
    return LayerMerge.measure(name, "copied", before, change, change, nbytes=nbytes)


def _newly_untied(model: nn.Module, swaps: list[Swap]) -> list[tuple[str, str]]:
    """Return (path, path of another module) for each weight that the two share now and will not share any more."""
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    leaving = {swap.old for swap in swaps if swap.new is not swap.old}  # a new module takes over its base's bias
    for path, module in named_modules(model):
        if module in leaving:
            continue
        for name, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append((path, module, name))
    exchanges = [(swap.path, exchange) for swap in swaps for exchange in swap.exchanges if exchange.before is not None]
    after = {(exchange.module, exchange.name): exchange.after for _, exchange in exchanges}
    return [
        (swapped, path)
        for swapped, exchange in exchanges
        for path, module, name in holders.get(id(exchange.before), [])
        if module is not exchange.module and after.get((module, name)) is not exchange.after
    ]


def _float_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype in which a model computes: its attribute `dtype`, or that of its first weight not in 4 bits."""
    declared = getattr(model, "dtype", None)
    if isinstance(declared, torch.dtype) and declared.is_floating_point:
        return declared
    quantized = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    skipped = {id(tensor) for module in quantized for tensor in module.parameters()}
    for module in adapter_modules(model).values():
        skipped |= {id(tensor) for name in module.names() for tensor in module.parameters_of(name).values()}
    dtypes = (tensor.dtype for tensor in model.parameters() if id(tensor) not in skipped and tensor.is_floating_point())
    return next(dtypes, quantized[0].source_dtype if quantized else torch.float32)
