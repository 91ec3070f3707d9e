"""LoRA-FA: A stays as it was, B learns as it would beside a frozen A, and x is not kept."""

from __future__ import annotations

import pytest
import torch
from made import adapted, small_tokenizer
from small_training import CONVERSATIONS, config
from torch import nn

from lorakit import Tokenizer, adapter_parameters, train
from lorakit.adapters import lora_layers
from lorakit.data import encode_records
from lorakit.errors import TrainingError
from lorakit.layers import AdapterSpec, LoRALinear
from lorakit.training.trainer import mean_loss


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("use_dora", [False, True])
def test_b_alone_learns(tok: Tokenizer, use_dora: bool) -> None:
    model = adapted(use_dora=use_dora)
    before = {path: {t: p.clone() for t, p in layer.parameters_of("default").items()} for path, layer in layers(model)}
    examples = encode_records(tok, CONVERSATIONS, 1024)
    untrained = mean_loss(model, examples, 2048)
    train(model, tok, CONVERSATIONS, config(lora_fa=True, lr=2e-2, max_steps=12))
    assert mean_loss(model, examples, 2048) < untrained - 0.1
    for path, layer in layers(model):
        for table, parameter in layer.parameters_of("default").items():
            assert torch.equal(parameter, before[path][table]) is (table == "lora_A"), (path, table)
    assert all(parameter.requires_grad for parameter in adapter_parameters(model))  # as it was before the run


def layers(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    return [(path, layer) for path, layer in lora_layers(model).items() if isinstance(layer, LoRALinear)]


def test_the_input_is_not_kept_and_bs_gradient_is_the_same() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 8).requires_grad_(False))
    layer.add("default", AdapterSpec(2, 1.0, neutral_start=False))
    layer.active = ("default",)
    x = torch.randn(16, 64, requires_grad=True)
    found = []
    for is_frozen in (False, True):
        layer.lora_A["default"].requires_grad_(not is_frozen)
        kept: list[int] = []

        def keep(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = layer(x)
        assert (x.data_ptr() in kept) is not is_frozen
        found.append(torch.autograd.grad(y.sin().sum(), [x, layer.lora_B["default"]]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_nothing_to_freeze(tok: Tokenizer) -> None:
    model = adapted()
    for _, layer in layers(model):
        layer.lora_A["default"].requires_grad_(False)
    with pytest.raises(TrainingError, match="no lora_A is trained"):
        train(model, tok, CONVERSATIONS, config(lora_fa=True))
