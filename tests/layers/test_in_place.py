"""A model may change a layer's output in place, as with `y *= scaling` or `dropout(y, inplace=True)`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit import LoraConfig, add_adapter
from lorakit.layers import Linear4bit


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8), (1, 2, 5, 8)])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_dropout": 0.5}, {"bias": "lora_only"}], ids=str)
@pytest.mark.parametrize("is_4bit", [False, True])
def test_the_output_can_be_changed_in_place(shape: tuple[int, ...], settings: dict[str, object], is_4bit: bool) -> None:
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(8, 6)
    model = nn.Sequential(Linear4bit.from_linear(layer) if is_4bit else layer)
    add_adapter(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **settings))
    grads = []
    for in_place in (False, True):
        torch.manual_seed(1)
        x = torch.randn(shape, requires_grad=True)
        y = model.train()(x)
        y = y.mul_(3.0) if in_place else y * 3.0
        y.square().sum().backward()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        grads.append([x.grad, *(parameter.grad for parameter in parameters)])
        model.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("shape", [(5, 8), (2, 50, 8)])
def test_the_output_of_a_4bit_layer_can_be_changed_in_place(shape: tuple[int, ...]) -> None:
    layer, x = Linear4bit.from_linear(nn.Linear(8, 6)), torch.randn(shape, requires_grad=True)
    (wanted,) = torch.autograd.grad((layer(x) * 3.0).square().sum(), x)
    assert torch.equal(torch.autograd.grad(layer(x).mul_(3.0).square().sum(), x)[0], wanted)
