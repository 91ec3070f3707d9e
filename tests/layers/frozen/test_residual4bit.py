"""`ResidualLinear4bit`: the layer with the dense weight codes + up @ down, forward and backward, bare and adapted."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_alike
from torch import Tensor, nn

from lorakit import quantize
from lorakit.errors import ShapeError
from lorakit.layers import VARIANTS, AdapterSpec, LoRALinear, ResidualLinear4bit, linear_together
from lorakit.layers.variants.dora import row_norms

# Roundings through a layer and back: sums over 64 inputs, 3 ranks, 48 outputs and 3 ranks; with adapters 4 ranks twice
# and 7 tokens more.
TERMS = 64 + 3 + 48 + 3 + 2 * 4 + 7 + 8


def layer(rank: int = 3, bias: bool = True, dtype: torch.dtype = torch.float32) -> ResidualLinear4bit:
    torch.manual_seed(0)
    weight = quantize(torch.randn(48, 64))
    up, down = torch.randn(48, rank, dtype=dtype), torch.randn(rank, 64, dtype=dtype)
    return ResidualLinear4bit(weight, up, down, torch.randn(48) if bias else None)


def dense(of: ResidualLinear4bit) -> nn.Linear:
    plain = nn.Linear(64, 48, bias=of.bias is not None)
    plain.weight.data = of.quantized.dequantize(torch.float32) + of.residual_up.float() @ of.residual_down.float()
    if of.bias is not None:
        plain.bias.data = of.bias.data.clone()
    return plain.requires_grad_(False)


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 64), (2, 3, 64)], ids=str)
def test_it_computes_what_the_dense_layer_does(bias: bool, shape: tuple[int, ...]) -> None:
    ours = layer(bias=bias)
    x = torch.randn(shape)
    assert_alike(gradients(ours, x), gradients(dense(ours), x), TERMS)
    with torch.inference_mode():
        assert_alike(ours(x), dense(ours)(x), TERMS)
    assert torch.equal(ours.dense_weight(torch.float32), dense(ours).weight)


def test_beneath_adapters_in_the_fused_function() -> None:
    ours = [layer(), layer(rank=1)]
    plain = [dense(one) for one in ours]
    results = []
    for bases in (ours, plain):
        torch.manual_seed(1)
        adapted = [LoRALinear(base) for base in bases]
        for one in adapted:
            one.add("a", AdapterSpec(4, 2.0, neutral_start=False))
            one.active = ("a",)
            assert one.can_fuse(torch.zeros(1, 64))
        x = torch.randn(7, 64).requires_grad_()
        sum(y.square().sum() for y in linear_together(x, *adapted)).backward()
        results.append([x.grad, *(p.grad for one in adapted for p in one.parameters_of("a").values())])
    assert_alike(results[0], results[1], TERMS)


def test_no_conversion_changes_its_bytes() -> None:
    ours = layer()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items() if name != "bias"}
    ours.bfloat16()
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in before.items())
    assert ours(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert "residual rank 3" in repr(ours)


def test_what_does_not_fit() -> None:
    weight = quantize(torch.randn(48, 64))
    for up, down in (((48, 3), (2, 64)), ((47, 3), (3, 64)), ((48, 3), (3, 63))):
        with pytest.raises(ShapeError, match="do not fit a weight of shape"):
            ResidualLinear4bit(weight, torch.zeros(up), torch.zeros(down))


def test_the_norms_of_a_dora_adapter_count_the_low_rank_part() -> None:
    norms = []
    for base in (layer(), dense(layer())):
        torch.manual_seed(2)
        adapted = LoRALinear(base)
        adapted.add("a", AdapterSpec(4, 0.5, variant=VARIANTS["dora"], neutral_start=False))
        norms.append(row_norms(adapted, *adapted.factors("a"), torch.float32))
    assert_alike(norms[0], norms[1], TERMS)
