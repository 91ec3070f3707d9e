"""Activation checkpointing: less is kept, nothing else changes."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import pytest
import torch
from made import adapted, small_decoder
from torch import Tensor, nn

from lorakit import TrainConfig, add_adapter
from lorakit.adapters import LoraConfig
from lorakit.errors import ConfigError, TrainingError
from lorakit.models.decoder.loss import summed_loss
from lorakit.training.activations import HostActivations, saving_activations

KINDS: list[Any] = ["none", "mlp", "layer", 2, 3]
LENGTHS = [40, 17, 33]


def saved_bytes(model: nn.Module, how: Any) -> tuple[int, Tensor, list[Tensor]]:
    """Return the bytes of distinct activations kept for the backward pass, the loss and the gradients."""
    torch.manual_seed(0)
    ids = torch.randint(400, (sum(LENGTHS),))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with saving_activations(model, how):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = summed_loss(model, ids, ids.roll(-1), LENGTHS)
        return sum(kept.values()), loss.detach(), list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_results_are_the_same_to_the_bit(how: Any, dropout: float) -> None:
    model = adapted(init_lora_weights=False, lora_dropout=dropout).train()
    _, loss, gradients = saved_bytes(model, "none")
    _, other, others = saved_bytes(model, how)
    assert torch.equal(loss, other)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    assert all(layer.checkpointing == "none" for layer in model.model.layers)  # afterwards, too


def test_each_kind_keeps_less_than_the_one_before() -> None:
    model = small_decoder(num_hidden_layers=6)
    add_adapter(model, LoraConfig(r=4))
    sizes = {how: saved_bytes(model.train(), how)[0] for how in KINDS}
    assert sizes["layer"] < sizes[2] < sizes[3] < sizes["none"]
    assert sizes["layer"] < sizes["mlp"] < sizes["none"]


def test_nothing_is_checkpointed_in_evaluation() -> None:
    model = adapted()
    with saving_activations(model, "layer"), torch.no_grad():
        assert not summed_loss(model, torch.arange(9), torch.arange(9), [9]).requires_grad


def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="checkpointing"):
        TrainConfig(checkpointing="some")
    with pytest.raises(ConfigError, match="checkpointing"):
        TrainConfig(checkpointing=1)
    with (
        pytest.raises(TrainingError, match="Linear does not offer checkpointing: mlp"),
        saving_activations(nn.Linear(2, 2), "mlp"),
    ):
        pass


class TestOffloading:
    """Without a GPU the copies go from host memory to host memory, through the same code."""

    @pytest.mark.parametrize("how", KINDS)
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_results_are_the_same_to_the_bit(self, how: Any, dropout: float) -> None:
        model = adapted(init_lora_weights=False, lora_dropout=dropout).train()
        ids, parameters = torch.arange(sum(LENGTHS)), [p for p in model.parameters() if p.requires_grad]
        results = []
        for offloaded in (False, True):
            torch.manual_seed(0)
            with HostActivations(model, 64) if offloaded else contextlib.nullcontext(), saving_activations(model, how):
                loss = summed_loss(model, ids, ids.roll(-1), LENGTHS)
                results.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_large_activations_are_copied_and_let_go(self) -> None:
        hooks = HostActivations(nn.Linear(2, 2), smallest=400)
        for given in (torch.randn(10, 10), torch.randn(4, 5, 6).transpose(0, 2), torch.randn(400).bfloat16()[::2]):
            device, host = hooks.pack_hook(given)
            assert host.data_ptr() != given.data_ptr() and not host.is_pinned()
            back = hooks.unpack_hook((device, host))
            assert torch.equal(back, given) and back.dtype == given.dtype
        x = torch.randn(400, requires_grad=True)
        with hooks:
            inner = x.exp()  # saved by exp itself, and by sin
            freed, total = weakref.ref(inner), inner.sin().sum()
        del inner
        assert freed() is None
        total.backward()
        assert torch.equal(x.grad, x.detach().exp() * x.detach().exp().cos())

    def test_what_is_saved_twice_is_copied_once(self) -> None:
        hooks = HostActivations(nn.Linear(2, 2), smallest=400)
        x = torch.randn(100)
        first, second = hooks.pack_hook(x)[1], hooks.pack_hook(x)[1]
        assert first is second
        x += 1
        assert torch.equal(hooks.pack_hook(x)[1], x) and not torch.equal(first, x)

    def test_what_the_backward_pass_computes_again_stays(self) -> None:
        hooks, again, kept = HostActivations(nn.Linear(2, 2), smallest=400), torch.randn(100), []
        x = torch.randn(100, requires_grad=True)
        x.register_hook(lambda gradient: kept.append(hooks.pack_hook(again)[1]))
        x.sum().backward()
        assert kept[0].data_ptr() == again.data_ptr()
        assert hooks.pack_hook(again)[1].data_ptr() != again.data_ptr()

    def test_a_decoder_copies_each_of_its_activations_once(self) -> None:
        model, ids = adapted(init_lora_weights=False).train(), torch.arange(60)
        hooks = HostActivations(model, 1000)
        seen: list[tuple[Tensor, Tensor]] = []

        def to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
            device, host = hooks.pack_hook(tensor)
            seen.append((tensor, host))
            return device, host

        with torch.autograd.graph.saved_tensors_hooks(to_host, hooks.unpack_hook):
            loss = summed_loss(model, ids, ids.roll(-1), [60])
        loss.backward()
        pairs = {(given.data_ptr(), host.data_ptr()) for given, host in seen if given.data_ptr() != host.data_ptr()}
        assert len(pairs) == len({given for given, _ in pairs}) > 10
        assert len(seen) > len(pairs)

    def test_small_ones_parameters_and_buffers_stay(self) -> None:
        model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30))
        hooks = HostActivations(model, smallest=100)
        own = [*model.parameters(), model[0].weight.t(), model[0].weight[1:], model[1].running_mean]
        for stays in (torch.randn(24), *own):
            assert hooks.pack_hook(stays)[1].data_ptr() == stays.data_ptr()

    def test_a_result_that_stays_is_freed(self) -> None:
        x = torch.randn(4, requires_grad=True)
        with HostActivations(nn.Linear(2, 2)):
            y = x.exp()  # which saves its own result
        freed = weakref.ref(y)
        del y
        assert freed() is None  # at once: the garbage collector knows nothing of autograd's references

    def test_a_model_on_the_cpu_has_no_gpu_to_relieve(self) -> None:
        with pytest.raises(TrainingError, match="on the CPU"), saving_activations(adapted(), "none", offload=True):
            pass
