"""What a merge does to weights that modules share: who follows, who is parted, and how a saved model stays as it is.

transformers declares in `_tied_weights_keys` which parameters of a model class are tied, target -> source. It writes a
shared parameter once, and when it reads a model, it ties each target that the file lacks to its source. So each target
that a merge parts from its source must be in the file, and must not share its memory with another one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from torch import nn

from ...errors import AdapterError
from ...layers import AdapterModule, TiedModule
from ...layers.frozen.quantized_module import frozen
from ..attach.state import adapter_modules
from ..attach.targeting import unwrapped
from ..attach.ties import Holder, Ties, plain_path
from ..attach.wrappers import named_modules
from .swaps import Exchange, Swap


class TiesAfter:
    """The ties of a model as a merge is going to leave them.

    Attributes:
        untied: (path, path of another module) for each parameter that the two share now and will not share any more.
        parted: exchanges that give parameters memory of their own, so that transformers saves each.
        unties: whether the model's setting `tie_word_embeddings` has to become false.
    """

    def __init__(self, model: nn.Module, swaps: Sequence[Swap]) -> None:
        self._ties = Ties(model)
        exchanges = [(swap.path, exchange) for swap in swaps for exchange in swap.exchanges]
        self._after = {(exchange.module, exchange.name): exchange.after for _, exchange in exchanges}
        leaving = {swap.old for swap in swaps if swap.new is not swap.old}  # a new module takes over its base's bias
        self.untied = [
            (path, holder.path)
            for path, exchange in exchanges
            if isinstance(exchange.before, nn.Parameter)
            for holder in self._ties.holders(exchange.before)
            if holder.module not in leaving and not self._is_tied(holder.module, holder.name, exchange.after)
        ]
        self.parted: list[Exchange] = []
        self.unties = bool(self.untied)
        if self.untied and (declared := list(self._declared(model))):
            self._part(model, declared)

    def check_followers(self, model: nn.Module, names: Collection[str]) -> None:
        """Raise AdapterError if another adapter's module follows a weight that it will not share any more."""
        tied = {path: module for path, module in adapter_modules(model).items() if isinstance(module, TiedModule)}
        for path, module in tied.items():
            for name in module.names():
                if name not in names and any(self._is_parted(module, *one) for one in module.sources(name).items()):
                    raise AdapterError(
                        f"{path} follows a weight that the adapter '{name}' trains, and the merge gives it another; "
                        f"merge '{name}' too, or remove it first"
                    )

    def _is_parted(self, module: TiedModule, name: str, followed: tuple[AdapterModule, str]) -> bool:
        owner, _, leaf = followed[1].rpartition(".")
        source = followed[0].base_layer.get_submodule(owner)
        return not self._is_tied(unwrapped(module), name, self._after.get((source, leaf), source._parameters[leaf]))

    def _is_tied(self, module: nn.Module, name: str, value: object) -> bool:
        return self._after.get((module, name), module._parameters[name]) is value

    def _value(self, holder: Holder) -> nn.Parameter:
        key = holder.module, holder.name
        return self._after.get(key, holder.module._parameters[holder.name])  # type: ignore[return-value]

    def _declared(self, model: nn.Module) -> Iterator[tuple[Holder, Holder]]:
        """Yield (target, source) for each pair that transformers declares and that shares its parameter now."""
        by_name = {f"{holder.path}.{holder.name}".lstrip("."): holder for holder in self._ties.every()}
        for prefix, module in named_modules(model):
            keys = getattr(module, "_tied_weights_keys", None)
            if not isinstance(keys, dict) or not getattr(getattr(module, "config", None), "tie_word_embeddings", False):
                continue
            start = re.escape(f"{plain_path(model, prefix)}." if prefix else "")
            for pair in keys.items():
                targets, sources = (
                    [holder for name, holder in by_name.items() if re.match(start + pattern, name)] for pattern in pair
                )
                for one in targets:
                    parameter = one.module._parameters[one.name]
                    yield from ((one, other) for other in sources if other.module._parameters[other.name] is parameter)

    def _part(self, model: nn.Module, declared: list[tuple[Holder, Holder]]) -> None:
        """Give each target that is parted from its source a parameter of its own, and decide on the setting."""
        parted = [(one, other) for one, other in declared if self._value(one) is not self._value(other)]
        # Where other ties remain, the setting stays, since it stands for all of them. transformers compares the values
        # and leaves apart those that differ. Some encoder-decoders derive the scale of their logits from it, too.
        config = getattr(model, "config", None)
        self.unties = len(parted) == len(declared) and not getattr(config, "is_encoder_decoder", False)
        seen: set[int] = set()
        for target, _ in parted:
            value = self._value(target)
            if id(value) in seen:
                own = frozen(value.detach().clone())
                self.parted.append(Exchange(target.module, target.name, value, own))
                self._after[target.module, target.name] = own
                self.untied.append((target.path, "the modules that shared its weight"))
            seen.add(id(value))


def follow(swaps: Sequence[Swap]) -> None:
    """Give modules that follow a trained parameter its new value, the same object, so that they stay tied."""
    after = {id(exchange.before): exchange.after for swap in swaps for exchange in swap.exchanges}
    for swap in swaps:
        if isinstance(swap.module, TiedModule):
            base = unwrapped(swap.module)
            for name, before in base._parameters.items():
                if before is not None and id(before) in after:
                    swap.exchanges.append(Exchange(base, name, before, after[id(before)]))
