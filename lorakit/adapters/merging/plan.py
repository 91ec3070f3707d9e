"""Working out a merge: every new weight and the report, before anything in the model changes."""

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
from .base import Base, WrongBase, open_base, weight_from
from .modules import holder, holds_weight, in_memory, new_base, standing_on
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
    parts = {path: part for path, part in adapter_modules(model).items() if set(names) & set(part.names())}
    notes: list[str] = []
    starts = (adapter_configs(model)[name].start for name in names)
    repairing = next((start for start in starts if start.repairs_quantization), None)
    if base is None and repairing is not None:
        notes.append(
            f"not merged onto a 16-bit checkpoint: '{repairing.name}' starts at what quantization took from it"
        )
        base = False
    source = None
    if base or any(isinstance(part.base_layer, QuantizedModule) for part in parts.values()):
        source = open_base(model, base)
    plan = _MergePlan(parts, tuple(names), quantize, residual_rank, _float_dtype(model))
    try:
        swaps, report = plan.make(source, notes)
    except WrongBase as error:
        if base is not None:
            raise
        notes.append(f"not merged onto the checkpoint that the model was loaded from: {error}")
        swaps, report = plan.make(None, notes)
    untied = _newly_untied(model, swaps)
    notes += [f"{path} shared its weight with {other}, and has its own from now on" for path, other in untied]
    return MergeState(tuple(names), swaps, bool(untied)), report


@dataclass(frozen=True)
class _MergePlan:
    parts: dict[str, AdapterModule]
    names: tuple[str, ...]
    quantize: bool
    residual_rank: int | None
    dtype: torch.dtype  # of what was in 4 bits and becomes dense

    def make(self, source: Checkpoint | None, notes: list[str]) -> tuple[list[Swap], MergeReport]:
        """Compute all parts, onto the source's weights where there is one."""
        report = MergeReport(self.names, [], None if source is None else source.folder, notes)
        swaps, refused = [], []
        for path, part in self.parts.items():
            names = [name for name in self.names if name in part.names()]
            if isinstance(part, AdaptedLayer):
                swap, entry, is_limited = self._layer(path, part, names, source)
                report.layers.append(entry)
                if is_limited and entry.share < LEAST_SHARE:
                    wanted = least_rank(MergeUpdate.of(part, names).factored()[0], LEAST_SHARE)
                    refused.append(f"{path}: {entry.share:.3f}, needs rank {wanted}")
            else:
                swap = Swap(path, part, part.base_layer, part.base_layer, _copied(path, part, names))
            swaps.append(swap)
            report.layers += [_entry(path, exchange) for exchange in swap.exchanges if not holds_weight(part, exchange)]
        if refused:
            raise AdapterError(
                f"at residual_rank={self.residual_rank} less than {LEAST_SHARE} of the update would survive in 4 bits:"
                f"{listing(refused, 10)}\nGive a 16-bit base, a higher residual_rank, or quantize=False"
            )
        _tie_heads(swaps)
        return swaps, report

    def _layer(
        self, path: str, layer: AdaptedLayer, names: list[str], source: Checkpoint | None
    ) -> tuple[Swap, LayerMerge, bool]:
        self._check(path, layer)
        old, origin = layer.base_layer, None
        if source is not None and not isinstance(layer, LoRAParameter):  # whose name in a checkpoint is anybody's guess
            origin = weight_from(source, path, layer)
        with standing_on(layer, origin):  # the update of some variants depends on the weight that it is added to
            update = MergeUpdate.of(layer, names)
            base = layer.base_weight(update.dense.dtype)
        if self.quantize and isinstance(old, QuantizedModule):
            merged = self._merged_4bit(path, old, update, base, is_source=origin is not None)
        else:
            merged = merged_dense(base, update.dense, *self._dense_form(layer, is_source=origin is not None))
        if not torch.isfinite(merged.real).all():
            raise AdapterError(f"{path}: the merged weight would hold inf or nan in {str(merged.weight.dtype)[6:]}")
        rank = merged.residual.rank if merged.residual else 0
        nbytes = in_memory(layer), merged.nbytes
        entry = LayerMerge.measure(path, merged.how, base, update.dense, merged.real, nbytes, rank)
        swap = Swap(path, layer, old, new_base(old, merged))
        if swap.new is old:
            assert isinstance(merged.weight, Tensor)  # a dense layer stays dense
            module, name = holder(layer)
            swap.exchanges.append(Exchange(module, name, module._parameters[name], frozen(merged.weight)))
        changes = [change for name in names if (change := layer.delta_bias(name)) is not None]
        if changes:
            before = swap.new._parameters["bias"]
            total = torch.stack([change.float() for change in changes]).sum(0)
            after = total if before is None else (before.float() + total).to(before.dtype)
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
        """Refuse what cannot be right, whatever the numbers."""
        for name in layer.names():
            if name not in self.names and layer.adapters[name].variant.multiplies_base:
                scales = layer.adapters[name].variant.scales
                raise AdapterError(
                    f"{path}: the adapter '{name}' {scales} of the weight, and would scale the merged update too; "
                    f"merge it together with {', '.join(self.names)}, or remove it first"
                )
        if self.quantize and isinstance(layer.base_layer, ResidualLinear4bit):
            raise AdapterError(
                f"{path} holds the low-rank part of an earlier merge for good; it can be merged into with "
                "quantize=False only"
            )


def _copied(path: str, part: AdapterModule, names: list[str]) -> list[Exchange]:
    """Return the parameters that trained copies, or trained rows, put in the place of the base layer's."""
    if isinstance(part, TiedHead):
        return []  # it follows the embedding, see `_tie_heads`
    if isinstance(part, TrainedTokens):
        tokens = [token for name in names for token in part.tokens[name]]
        if len(set(tokens)) < len(tokens):
            raise AdapterError(f"{path}: {', '.join(names)} train rows of the same tokens, of which there is no sum")
        before = cast(nn.Parameter, part.base_layer._parameters["weight"])
        after = before.detach().clone()
        for name in names:
            rows = part.parameters_of(name)["trainable_tokens_delta"]
            after[torch.tensor(part.tokens[name], device=after.device)] = rows.detach().to(after)
        return [Exchange(part.base_layer, "weight", before, frozen(after))]
    assert isinstance(part, SavedModule)  # there is no other kind
    if len(names) > 1:
        raise AdapterError(f"{path}: {', '.join(names)} each have a copy of this module, of which there is no sum")
    exchanges = []
    for key, value in part.parameters_of(names[0]).items():
        owner, _, leaf = key.rpartition(".")
        module = part.base_layer.get_submodule(owner)
        before = cast(nn.Parameter, module._parameters[leaf])
        exchanges.append(Exchange(module, leaf, before, frozen(value.detach().to(before.dtype, copy=True))))
    return exchanges


def _tie_heads(swaps: list[Swap]) -> None:
    """Give heads that follow an embedding its new weight: the same parameter, so that they stay tied."""
    after = {id(exchange.before): exchange.after for swap in swaps for exchange in swap.exchanges}
    for swap in swaps:
        if isinstance(swap.part, TiedHead):
            before = cast(nn.Parameter, swap.part.base_layer._parameters["weight"])
            if id(before) in after:
                swap.exchanges.append(Exchange(swap.part.base_layer, "weight", before, after[id(before)]))


def _entry(path: str, exchange: Exchange) -> LayerMerge:
    """Describe the exchange of a parameter by a copy of it; what is to come of a copy is the copy."""
    after = exchange.after.float()
    before = torch.zeros_like(after) if exchange.before is None else exchange.before.detach().float()
    name = f"{path}.{exchange.name}"
    nbytes = 0 if exchange.before is None else exchange.before.nbytes
    return LayerMerge.measure(name, "copied", before, after - before, after - before, (nbytes, exchange.after.nbytes))


def _newly_untied(model: nn.Module, swaps: list[Swap]) -> list[tuple[str, str]]:
    """Return (path, path of another module) of weights that are shared now and will not be, as a tied head's."""
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append((path, module, name))
    exchanges = [(swap.path, exchange) for swap in swaps for exchange in swap.exchanges if exchange.before is not None]
    after = {(exchange.module, exchange.name): exchange.after for _, exchange in exchanges}
    return [
        (own, path)
        for own, exchange in exchanges
        for path, module, name in holders[id(exchange.before)]
        if module is not exchange.module and after.get((module, name)) is not exchange.after
    ]


def _float_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that a model computes in: its own word for it, or that of its first weight not in 4 bits."""
    said = getattr(model, "dtype", None)
    if isinstance(said, torch.dtype) and said.is_floating_point:
        return said
    quantized = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    own = [tensor for module in quantized for tensor in module.parameters()]
    for part in adapter_modules(model).values():
        own += [tensor for name in part.names() for tensor in part.parameters_of(name).values()]
    skipped = {id(tensor) for tensor in own}
    found = (tensor.dtype for tensor in model.parameters() if id(tensor) not in skipped and tensor.is_floating_point())
    return next(found, quantized[0].source_dtype if quantized else torch.float32)
