"""Planning a merge: every new weight and the report are computed before the model changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

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
    TiedModule,
    TrainedTokens,
)
from ...layers.frozen.calls import has_hooks, is_dense, is_elsewhere
from ...layers.frozen.quantized_module import QuantizedModule, frozen
from ...layers.frozen.values import bitsandbytes_4bit
from ..attach.known_weights import is_product_with, weight_problem
from ..attach.state import adapter_configs, adapter_modules
from .base import Base, WrongBase, open_base, weight_from
from .modules import dense_base, exchanges_weight, holder, new_base, weight_bytes, with_our_form
from .report import LEAST_SHARE, LayerMerge, MergeReport
from .swaps import Exchange, MergeState, Swap
from .ties import TiesAfter, follow
from .weights import (
    MergedWeight,
    MergeUpdate,
    format_of,
    least_rank,
    merged_4bit,
    merged_4bit_with_residual,
    merged_dense,
)


class PlannedLayer(NamedTuple):
    """What a merge is going to do to one module with adapters.

    Attributes:
        swap: the module's new parameters.
        entries: its lines in the report.
        refusal: why the merge must not take place, if a limit on the residual's rank left too much out; else "".
    """

    swap: Swap
    entries: list[LayerMerge]
    refusal: str = ""


def plan_merge(
    model: nn.Module, names: Sequence[str], base: Base, quantize: bool, residual_rank: int | None
) -> MergePlan:
    """Find the modules of a merge and the checkpoint onto which it goes; arguments and errors as `merge_adapter`."""
    modules = {path: module for path, module in adapter_modules(model).items() if set(names) & set(module.names())}
    notes: list[str] = []
    starts = (adapter_configs(model)[name].start for name in names)
    repairing = next((start for start in starts if start.repairs_quantization), None)
    if base is None and repairing is not None:
        notes.append(f"not merged onto a 16-bit checkpoint: '{repairing.name}' starts at the error of quantizing it")
        base = False
    source = None
    bases = [module.base_layer for module in modules.values()]
    if base or any(isinstance(one, QuantizedModule) or bitsandbytes_4bit(one) is not None for one in bases):
        source = open_base(model, base)
    dtype = _float_dtype(model)
    return MergePlan(modules, tuple(names), source, base is not None, quantize, residual_rank, dtype, notes)


@dataclass(frozen=True)
class MergePlan:
    """The modules and the settings of one merge.

    Attributes:
        modules: those with one of the adapters, by path, in model order.
        names: of the adapters.
        source: the 16-bit checkpoint to whose weights the update is added; None for the model's own weights.
        is_named: whether the caller chose the source, so that another must not take its place.
        quantize: whether 4-bit layers stay in 4 bits.
        residual_rank: most columns of the low-rank part beside 4 bits; None for as many as the update has.
        dtype: of weights that were in 4 bits and become dense.
        notes: remarks for the report.
    """

    modules: dict[str, AdapterModule]
    names: tuple[str, ...]
    source: Checkpoint | None
    is_named: bool
    quantize: bool
    residual_rank: int | None
    dtype: torch.dtype
    notes: list[str]

    def onto_own_weights(self, error: WrongBase) -> MergePlan:
        """Return the plan without its source, which does not fit; raise the error if the caller named the source."""
        if self.is_named:
            raise error
        note = f"not merged onto the checkpoint that the model was loaded from: {error}"
        return replace(self, source=None, notes=[*self.notes, note])

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge_layer(self, path: str) -> PlannedLayer:
        """Compute the merged weight of one module, W' = W + update; the module stays as it is.

        Raises:
            AdapterError: the merge would be wrong for this module, or its weight would hold inf or nan.
            WrongBase: the source does not hold the weight from which the module was made.
        """
        layer = self.modules[path]
        names = [name for name in self.names if name in layer.names()]
        if any(map(is_elsewhere, layer.modules())):
            raise AdapterError(f"{path}: its weights are on disk or in host memory; merge before they are offloaded")
        if not isinstance(layer, AdaptedLayer):
            return _plan_copies(path, layer, names)
        self._check(path, layer)
        with with_our_form(layer, self.dtype) as old:
            origin = None
            if self.source is not None and not isinstance(layer, LoRAParameter):  # a checkpoint has other names for it
                origin = self._source_of(path, layer, old)
            with dense_base(layer, origin):  # the update of some variants depends on the base weight
                update = MergeUpdate.of(layer, names)
                base = layer.base_weight(update.dense.dtype)
            if self.quantize and isinstance(layer.base_layer, QuantizedModule):
                merged = self._merged_4bit(path, layer.base_layer, update, base, is_source=origin is not None)
            else:
                merged = merged_dense(base, update.dense, *self._dense_form(layer, is_source=origin is not None))
            if not torch.isfinite(merged.real).all():
                raise AdapterError(f"{path}: the merged weight would hold inf or nan in {str(merged.weight.dtype)[6:]}")
            swap, refusal = _layer_swap(path, layer, names, merged), ""
            _check_hooks(path, layer, old, swap.new, base)
        swap.old = old
        entry = LayerMerge.measure(
            path, merged.how, base, update.dense, merged.real, nbytes=(weight_bytes(layer), merged.nbytes),
            residual_rank=merged.residual.rank if merged.residual else 0,
        )  # fmt: skip
        if merged.limited and entry.share < LEAST_SHARE:
            refusal = f"{path}: {entry.share:.3f}, needs rank {least_rank(update.factored()[0], LEAST_SHARE)}"
        return PlannedLayer(swap, [entry, *_copy_entries(swap)], refusal)

    def _source_of(self, path: str, layer: AdaptedLayer, old: nn.Module) -> Tensor | None:
        """Return a layer's weight in the source. An 8-bit layer, `old`, cannot be checked against a source."""
        assert self.source is not None
        if is_dense(old._parameters.get("weight")) or isinstance(layer.base_layer, QuantizedModule):
            return weight_from(self.source, path, layer)
        if self.is_named:
            raise AdapterError(f"{path} is in 8 bits and can be merged onto its own values only; set base=False")
        return None

    def completed(self, model: nn.Module, layers: Sequence[PlannedLayer]) -> tuple[MergeState, MergeReport]:
        """Return the changes to the whole model, and the report, from those of its modules in model order.

        Raises:
            AdapterError: at this residual_rank too little of an update would survive, or another adapter would follow a
                weight that the merge parts.
        """
        if refused := [layer.refusal for layer in layers if layer.refusal]:
            raise AdapterError(
                f"at residual_rank={self.residual_rank} less than {LEAST_SHARE} of the update would survive in 4 bits:"
                f"{listing(refused, 10)}\nGive a 16-bit base, a higher residual_rank, or quantize=False"
            )
        swaps = [layer.swap for layer in layers]
        follow(swaps)
        ties = TiesAfter(model, swaps)
        ties.check_followers(model, self.names)
        notes = [f"{path} shared its weight with {other} and has its own from now on" for path, other in ties.untied]
        entries = [entry for layer in layers for entry in layer.entries]
        folder = None if self.source is None else self.source.folder
        report = MergeReport(self.names, entries, folder, self.notes + notes)
        return MergeState(self.names, swaps, ties.unties, ties.parted), report

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
        if not isinstance(layer.base_layer, QuantizedModule):
            _own_parameter(path, *holder(layer))
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
        if problem := weight_problem(layer):
            kind = type(layer.base_layer).__name__
            raise AdapterError(
                f"{path} is a {kind}, which {problem}; merged, it would give other numbers than with its adapter, so "
                "keep the adapter unmerged"
            )


def _check_hooks(path: str, layer: AdaptedLayer, old: nn.Module, new: nn.Module, base: Tensor) -> None:
    """Raise AdapterError if the hooks of a base layer would do something else to the merged one, `new`."""
    if new is not old and "forward" in vars(old):
        raise AdapterError(
            f"{path} has a patched forward, which the merged layer would not have; remove the patch first"
        )
    if not has_hooks(new) or isinstance(layer, LoRAParameter) or layer.takes_weight:
        return
    if isinstance(new, QuantizedModule):  # tried with a dense weight
        new = new_base(new, merged_dense(base, torch.zeros_like(base), base.dtype, ""))
    if not is_product_with(layer, new):
        raise AdapterError(
            f"{path} has hooks that do more than add to its output; merged, it would give other numbers than with its "
            "adapter, so remove them first"
        )


def _own_parameter(path: str, module: nn.Module, name: str) -> nn.Parameter:
    """Return the parameter that a merge replaces; refuse a module that computes it from others."""
    parameter = module._parameters.get(name)
    if parameter is None:
        raise AdapterError(
            f"{path} is a {type(module).__name__} that computes its {name} from other parameters, so there is nothing "
            "to merge into; take the parametrization away first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    return parameter


def _layer_swap(path: str, layer: AdaptedLayer, names: list[str], merged: MergedWeight) -> Swap:
    """Return the exchange of a layer's weight, and of its bias if an adapter trained one."""
    swap = Swap(path, layer, layer.base_layer, new_base(layer.base_layer, merged))
    if swap.new is swap.old:
        assert isinstance(merged.weight, Tensor)  # a dense layer stays dense
        module, name = holder(layer)
        swap.exchanges.append(Exchange(module, name, module._parameters[name], frozen(merged.weight)))
    changes = [change for name in names if (change := layer.delta_bias(name)) is not None]
    if changes:
        before = cast(nn.Parameter | None, getattr(swap.new, "bias", None))
        total = torch.stack([change.float() for change in changes]).sum(0)
        after = total.to(merged.weight.dtype) if before is None else (before.float() + total).to(before.dtype)
        swap.exchanges.append(Exchange(swap.new, "bias", before, frozen(after)))
    return swap


def _plan_copies(path: str, module: AdapterModule, names: list[str]) -> PlannedLayer:
    """Return the plan for a module of which the adapters trained copies, or rows."""
    swap = Swap(path, module, module.base_layer, module.base_layer, _copied(path, module, names))
    return PlannedLayer(swap, _copy_entries(swap))


def _copied(path: str, module: AdapterModule, names: list[str]) -> list[Exchange]:
    """Return the exchanges of the base layer's parameters for the trained copies, or trained rows, of an adapter."""
    if isinstance(module, TiedModule):
        return []  # it follows another module, see `follow`
    if isinstance(module, TrainedTokens):
        return [_with_trained_rows(path, module, names)]
    assert isinstance(module, SavedModule)  # there is no other kind
    if len(names) > 1:
        raise AdapterError(f"{path}: {', '.join(names)} each have a copy of this module, and copies have no sum")
    base, copy = module.base_layer, module.parameters_of(names[0])
    before = {key: base.get_parameter(key) for key in copy}
    after = {id(before[key]): frozen(value.detach().to(before[key].dtype, copy=True)) for key, value in copy.items()}
    # A parameter that is tied within the module stays so, and copies of other adapters share what they do not train.
    others = [module.copies[other] for other in module.names() if other not in names]
    holders = [inner for one in (base, *others) for inner in one.modules()]
    exchanges = [
        Exchange(inner, leaf, parameter, after[id(parameter)])
        for inner in holders
        for leaf, parameter in inner._parameters.items()
        if parameter is not None and id(parameter) in after
    ]
    for key, value in module.buffers_of(names[0]).items():
        owner, _, leaf = key.rpartition(".")
        inner = base.get_submodule(owner)
        exchanges.append(Exchange(inner, leaf, base.get_buffer(key), value.detach().clone()))
    return exchanges


def _with_trained_rows(path: str, module: TrainedTokens, names: list[str]) -> Exchange:
    """Return the exchange of an embedding's table for one with the trained rows of some adapters."""
    tokens = [token for name in names for token in module.tokens[name]]
    if len(set(tokens)) < len(tokens):
        raise AdapterError(f"{path}: {', '.join(names)} train rows of the same tokens, and such rows have no sum")
    before = _own_parameter(path, module.base_layer, "weight")
    after = before.detach().clone()
    for name in names:
        rows = module.parameters_of(name)["trainable_tokens_delta"]
        after[torch.tensor(module.tokens[name], device=after.device)] = rows.detach().to(after)
    return Exchange(module.base_layer, "weight", before, frozen(after))


def _copy_entries(swap: Swap) -> list[LayerMerge]:
    """Return the report's lines for parameters replaced by trained copies: all of the change survives."""
    entries = []
    for exchange in swap.exchanges:
        if exchanges_weight(swap.module, exchange) or not isinstance(exchange.after, nn.Parameter):
            continue
        after = exchange.after.float()
        before = torch.zeros_like(after) if exchange.before is None else exchange.before.detach().float()
        name, change = f"{swap.path}.{exchange.name}", after - before
        nbytes = (0 if exchange.before is None else exchange.before.nbytes, exchange.after.nbytes)
        entries.append(LayerMerge.measure(name, "copied", before, change, change, nbytes=nbytes))
    return entries


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
