"""Adapters in any order of events: what the model computes is always what a plain dense computation says.

The reference below is written from the equations alone, in float64: W + sum of scaling * B @ A, DoRA's
m * (W + scaling * B @ A) / norm, gradients by autograd through dense weights. It knows nothing of lorakit.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tolerances import assert_alike, assert_within, rounding
from torch import Tensor, nn

from lorakit import (
    Linear4bit,
    LoraConfig,
    adapter_parameters,
    adapter_status,
    add_adapter,
    disable_adapters,
    load_adapter,
    merge_adapter,
    quantize,
    remove_adapter,
    save_adapter,
    set_adapter,
    set_trained,
    swap_adapter,
    unmerge_adapter,
    use_rows,
)
from lorakit.adapters import lora_layers
from lorakit.errors import AdapterError, CheckpointError

PATHS = ("0", "2", "4")
NAMES = st.sampled_from(["x", "y", "z"])
CHOICES = st.lists(NAMES, unique=True, max_size=3)
LEARNING_RATE = 0.1
# Roundings in float64: sums over 6, 8 and 8 inputs and up to 9 ranks each, the functions between them, gains and their
# norms; a training step goes through them twice more, and its result through the rest again.
TERMS = 3 * (8 + 9 + 16) * 4


# ---- the reference ---------------------------------------------------------------------------------------------------


@dataclass
class Update:
    """One adapter in one layer."""

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None

    def delta(self, weight: Tensor) -> Tensor:
        low_rank = self.scaling * self.b @ self.a
        if self.magnitude is None:
            return low_rank
        norm = (weight + low_rank).detach().square().sum(1, keepdim=True).sqrt()
        return self.magnitude[:, None] * (weight + low_rank) / norm - weight

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in (self.a, self.b, self.magnitude) if tensor is not None]

    def copy(self) -> Update:
        magnitude = None if self.magnitude is None else self.magnitude.clone()
        return Update(self.a.clone(), self.b.clone(), self.scaling, magnitude)


Adapter = dict[str, Update]  # by the layer's path


@dataclass
class Reference:
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    adapters: dict[str, Adapter] = field(default_factory=dict)
    merged: dict[str, Adapter] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)

    def weight(self, path: str, names: list[str]) -> Tensor:
        base = self.weights[path]
        merged = [adapter[path].delta(base) for adapter in self.merged.values() if path in adapter]
        base = base + sum(merged, torch.zeros_like(base))
        chosen = [self.adapters[name] for name in names]
        return base + sum((a[path].delta(base) for a in chosen if path in a), torch.zeros_like(base))

    def __call__(self, x: Tensor, names: list[str]) -> Tensor:
        first, middle, last = PATHS
        x = torch.tanh(x @ self.weight(first, names).T + self.biases[first])
        x = torch.tanh(x @ self.weight(middle, names).T + self.biases[middle])
        return x @ self.weight(last, names).T


# ---- the model beside it ---------------------------------------------------------------------------------------------


def build() -> tuple[nn.Sequential, Reference]:
    torch.manual_seed(0)
    quantized = quantize(torch.randn(8, 8))
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), Linear4bit(quantized, torch.randn(8)), nn.Tanh(), nn.Linear(8, 4, bias=False)
    ).double()
    weights = {
        "0": model[0].weight.detach().clone(),
        "2": quantized.dequantize(torch.float64),
        "4": model[4].weight.detach().clone(),
    }
    biases = {path: model.get_submodule(path).bias.detach().clone() for path in ("0", "2")}
    return model, Reference(weights, biases)


def bytes_of(tensors: list[Tensor]) -> list[bytes]:
    return [tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


class Adapters(RuleBasedStateMachine):
    """Attach, load, switch, merge, unmerge, disable, save, swap, remove and train, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.reference = build()
        self.x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        self.base = [*self.model.parameters(), *self.model.buffers()]
        self.modules = list(self.model.modules())
        self.before = bytes_of(self.base)
        self.trained: list[str] = []
        self.parked_active: list[str] = []  # of the merged ones, those that come back active
        self.parked_trained: list[str] = []
        self.disabled = contextlib.ExitStack()
        self.is_disabled = False
        self.folder = tempfile.TemporaryDirectory()
        self.saved: list[tuple[Path, Adapter]] = []
        self.seed = 0

    @property
    def names(self) -> list[str]:
        return list(self.reference.adapters)

    @property
    def effective(self) -> list[str]:
        return [] if self.is_disabled else self.reference.active

    def record(self, name: str, adapter: Adapter, trained: bool) -> None:
        self.reference.adapters[name] = adapter
        self.reference.active = [name]
        self.trained = [name] if trained else self.trained

    # ---- events ----

    @rule(
        name=NAMES,
        rank=st.integers(1, 3),
        alpha=st.sampled_from([1.0, 3.0]),
        paths=st.lists(st.sampled_from(PATHS), min_size=1, unique=True),
        dora=st.booleans(),
        trained=st.booleans(),
    )
    def attach(self, name: str, rank: int, alpha: float, paths: list[str], dora: bool, trained: bool) -> None:
        self.seed += 1
        torch.manual_seed(self.seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=paths, use_dora=dora, init_lora_weights=False)
        if name in self.names:
            with pytest.raises(AdapterError, match="already has"):
                add_adapter(self.model, config, name, trained=trained)
            return
        add_adapter(self.model, config, name, torch.float64, trained)
        adapter = {}
        for path, layer in lora_layers(self.model, name).items():
            a, b = layer.lora_A[name].detach().clone(), layer.lora_B[name].detach().clone()
            update = Update(a, b, alpha / rank, None)
            if dora:  # the magnitudes start at the norms, so that only the direction has changed
                weight, change = self.reference.weight(path, []), update.delta(a)
                update.magnitude = layer.table("lora_magnitude_vector")[name].detach().clone()
                # Measured in fp32, as the root of |w|² + 2 w·u + |u|², each a sum over the inputs and the ranks.
                norms, magnitudes = (weight + change).norm(dim=1), weight.norm(dim=1) + change.norm(dim=1)
                assert_within(update.magnitude, norms, rounding(8 + 2 * rank + 4, magnitudes.square() / norms))
            adapter[path] = update
        self.record(name, adapter, trained)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if name not in self.names:
            with pytest.raises(AdapterError, match="no adapter"):
                remove_adapter(self.model, name)
            return
        remove_adapter(self.model, name)
        del self.reference.adapters[name]
        self.reference.active = [other for other in self.reference.active if other != name]
        self.trained = [other for other in self.trained if other != name]

    @rule(names=CHOICES, which=st.sampled_from(["active", "trained"]))
    def switch(self, names: list[str], which: str) -> None:
        change = set_adapter if which == "active" else set_trained
        if not set(names) <= set(self.names):
            with pytest.raises(AdapterError, match="no adapter"):
                change(self.model, names)
        elif which == "active":
            set_adapter(self.model, names)
            self.reference.active = names
        else:
            set_trained(self.model, names)
            self.trained = names

    @rule(names=st.lists(NAMES, unique=True, min_size=1, max_size=2))
    def merge(self, names: list[str]) -> None:
        if not set(names) <= set(self.names):
            with pytest.raises(AdapterError, match=r"no adapter|merged already"):
                merge_adapter(self.model, names)
            return
        if set(self.reference.merged) & set(self.names):
            with pytest.raises(AdapterError, match="name of a merged one"):
                merge_adapter(self.model, names)
            return
        staying = [adapter for name, adapter in self.reference.adapters.items() if name not in names]
        leaving = [*self.reference.merged.values(), *(self.reference.adapters[name] for name in names)]
        touched = {path for adapter in leaving for path in adapter}
        if any(path in touched and update.magnitude is not None for a in staying for path, update in a.items()):
            with pytest.raises(AdapterError, match="scales the rows"):
                merge_adapter(self.model, names)
            return
        merge_adapter(self.model, names)
        for name in names:
            self.reference.merged[name] = self.reference.adapters.pop(name)
        self.parked_active += [name for name in self.reference.active if name in names]
        self.parked_trained += [name for name in self.trained if name in names]
        self.reference.active = [name for name in self.reference.active if name not in names]
        self.trained = [name for name in self.trained if name not in names]

    @rule()
    def unmerge(self) -> None:
        merged = self.reference.merged
        if not merged:
            with pytest.raises(AdapterError, match="nothing is merged"):
                unmerge_adapter(self.model)
        elif set(merged) & set(self.names):
            with pytest.raises(AdapterError, match="name of a merged one"):
                unmerge_adapter(self.model)
        else:
            unmerge_adapter(self.model)
            self.reference.adapters |= merged
            self.reference.merged = {}
            self.reference.active = [*self.reference.active, *self.parked_active]
            self.trained = [*self.trained, *self.parked_trained]
            self.parked_active, self.parked_trained = [], []

    @rule()
    def disable_or_enable(self) -> None:
        if self.is_disabled:
            self.disabled.close()
        else:
            self.disabled.enter_context(disable_adapters(self.model))
        self.is_disabled = not self.is_disabled

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names))
        path = save_adapter(self.model, Path(self.folder.name) / str(len(self.saved)), name)
        self.saved.append((path, {key: update.copy() for key, update in self.reference.adapters[name].items()}))

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), name=NAMES, trained=st.booleans())
    def load(self, data: st.DataObject, name: str, trained: bool) -> None:
        path, adapter = data.draw(st.sampled_from(self.saved))
        if name in self.names:
            with pytest.raises(AdapterError, match="already has"):
                load_adapter(self.model, path, name, trained)
            return
        load_adapter(self.model, path, name, trained, torch.float64)
        self.record(name, {key: update.copy() for key, update in adapter.items()}, trained)

    @precondition(lambda self: self.saved and self.names)
    @rule(data=st.data())
    def swap(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names))
        path, given = data.draw(st.sampled_from(self.saved))
        own = self.reference.adapters[name]
        fits = own.keys() == given.keys() and all(
            len(given[key].a) <= len(own[key].a) and (given[key].magnitude is None) == (own[key].magnitude is None)
            for key in own
        )
        if not fits:
            with pytest.raises(CheckpointError, match="cannot take the place"):
                swap_adapter(self.model, name, path)
            return
        swap_adapter(self.model, name, path)
        for key in own:
            rank, old = len(own[key].a), given[key].copy()
            spare = rank - len(old.a)
            a = torch.cat([old.a, torch.zeros(spare, old.a.shape[1])])
            b = torch.cat([old.b, torch.zeros(old.b.shape[0], spare)], dim=1) * (old.scaling / own[key].scaling)
            own[key] = Update(a, b, own[key].scaling, old.magnitude)

    @rule(names=st.lists(st.sampled_from(["x", "y", "z", "__base__"]), min_size=5, max_size=5))
    def rows(self, names: list[str]) -> None:
        if not set(names) <= {*self.names, "__base__"}:
            with pytest.raises(AdapterError, match="no adapter"), use_rows(self.model, names):
                pass
            return
        with torch.no_grad(), use_rows(self.model, names):
            found = self.model(self.x)
        for row, name in enumerate(names):
            chosen = [] if name == "__base__" or self.is_disabled else [name]
            self.close(found[row], self.reference(self.x[row], chosen))

    @precondition(lambda self: set(self.trained) & set(self.effective))
    @rule(by_row=st.booleans())
    def train_step(self, by_row: bool) -> None:
        learning = [name for name in self.names if name in self.trained and name in self.effective]
        mine = {name: adapter_parameters(self.model, name) for name in learning}
        adapters = {name: self.reference.adapters[name].values() for name in learning}
        theirs = {name: [leaf for update in updates for leaf in update.leaves()] for name, updates in adapters.items()}
        for leaf in itertools.chain.from_iterable(theirs.values()):
            leaf.requires_grad_()
        self.model.zero_grad()
        rows = [learning[row % len(learning)] for row in range(len(self.x))]
        if by_row:
            with use_rows(self.model, rows):
                self.model(self.x).square().sum().backward()
            losses = [self.reference(x, [name]).square().sum() for x, name in zip(self.x, rows, strict=True)]
        else:
            self.model(self.x).square().sum().backward()
            losses = [self.reference(self.x, self.effective).square().sum()]
        torch.stack(losses).sum().backward()
        with torch.no_grad():
            for name in learning:
                for parameter, leaf in zip(mine[name], theirs[name], strict=True):
                    assert parameter.grad is not None and leaf.grad is not None
                    self.close(parameter.grad, leaf.grad)
                    step = LEARNING_RATE / (1 + leaf.grad.norm())
                    parameter -= step * parameter.grad
                    leaf.requires_grad_(False).sub_(step * leaf.grad)
                    leaf.grad = None
        assert {n.rsplit(".", 1)[-1] for n, p in self.model.named_parameters() if p.grad is not None} == set(learning)

    # ---- what always holds ----

    @invariant()
    def outputs_are_the_references(self) -> None:
        with torch.no_grad():
            self.close(self.model(self.x), self.reference(self.x, self.effective))

    @invariant()
    def base_bytes_never_change(self) -> None:
        assert bytes_of(self.base) == self.before

    @invariant()
    def the_trained_are_trained(self) -> None:
        flags = {n.rsplit(".", 1)[-1] for n, p in self.model.named_parameters() if p.requires_grad}
        assert flags == (set(self.trained) if self.seed else {"weight", "bias"})
        idle = [] if not self.seed else [name for name in self.trained if name not in self.reference.active]
        status = adapter_status(self.model)
        expected = [f"{name}: trained, but not active: no gradient reaches it" for name in idle]
        assert sorted(status.irregularities) == sorted(expected)
        assert {info.name for info in status.adapters.values() if info.merged} == set(self.reference.merged)

    def close(self, found: Tensor, expected: Tensor) -> None:
        assert_alike(found, expected, TERMS)

    def teardown(self) -> None:
        if self.is_disabled:
            self.disable_or_enable()
        for name in self.names:
            self.remove(name)
        if self.reference.merged:
            self.unmerge()
            self.outputs_are_the_references()
            for name in self.names:
                self.remove(name)
        assert list(self.model.modules()) == self.modules
        assert bytes_of([*self.model.parameters(), *self.model.buffers()]) == self.before
        self.folder.cleanup()


TestAdapters = pytest.mark.filterwarnings("ignore:in .* layers less than")(Adapters.TestCase)
TestAdapters.settings = settings(max_examples=settings.default.max_examples // 5, stateful_step_count=20, deadline=None)
