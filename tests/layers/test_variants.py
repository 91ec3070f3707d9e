"""Variants of the update against their definitions: DoRA's norms, gradients and gain, the residual, the bias of B."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_alike, assert_within, rounding
from torch import Tensor, nn

from lorakit.layers import (
    VARIANTS,
    AdaptedLayer,
    AdapterSpec,
    Linear4bit,
    LoRAConv,
    LoRAEmbedding,
    LoRALinear,
    linear_together,
)
from lorakit.layers.variants.dora import row_norms
from lorakit.quantization import quantize

# Roundings through a layer and back: sums over at most 18 inputs, 3 ranks, 6 outputs, 3 ranks and 8 tokens; DoRA's norm
# over 18 inputs; the functions between.
TERMS = 80


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


BASES = {
    "linear": lambda: nn.Linear(6, 5),
    "linear-no-bias": lambda: nn.Linear(6, 5, bias=False),
    "4bit": lambda: Linear4bit(quantize(torch.randn(5, 6)), torch.randn(5)),
    "conv1d": lambda: Conv1D(5, 6),
    "conv-1": lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1),
    "conv-2": lambda: nn.Conv2d(2, 4, 3, padding=2, dilation=2, bias=False),
    "conv-circular": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
    "conv-3": lambda: nn.Conv3d(1, 3, 2),
    "embedding": lambda: nn.Embedding(9, 5),
}
INPUTS = {
    "conv-1": lambda: torch.randn(2, 3, 9),
    "conv-2": lambda: torch.randn(2, 2, 8, 8),
    "conv-circular": lambda: torch.randn(2, 2, 8, 8),
    "conv-3": lambda: torch.randn(2, 1, 4, 4, 4),
    "embedding": lambda: torch.tensor([[0, 3, 8], [3, 3, 1]]),
}


def adapted(base: str, variant: str = "plain", r: int = 2, **options: object) -> AdaptedLayer:
    torch.manual_seed(0)
    module = BASES[base]().requires_grad_(False)
    kind = next(kind for kind in (LoRALinear, LoRAConv, LoRAEmbedding) if kind.fits(module))
    layer = kind(module)
    layer.add("a", AdapterSpec(r, 0.7, variant=VARIANTS[variant], neutral_start=False, **options))
    with torch.no_grad():
        for parameter in layer.parameters_of("a").values():
            parameter.add_(torch.randn_like(parameter) / 4)
    layer.active = ("a",)
    return layer


def input_of(base: str) -> Tensor:
    torch.manual_seed(1)
    return INPUTS.get(base, lambda: torch.randn(2, 4, 6))()


def merged(layer: AdaptedLayer) -> nn.Module:
    """The base layer, dense, with the update in its weight and bias."""
    dense = copy.deepcopy(layer.base_layer)
    if isinstance(dense, Linear4bit):
        dense = nn.Linear(dense.in_features, dense.out_features)
        dense.bias.data = layer.base_layer.bias.data.clone()
    dense.weight.data = layer.base_weight(torch.float32) + layer.delta_weight("a").detach()
    change = layer.delta_bias("a")
    if change is not None:
        dense.bias.data = layer.base_layer.bias.data + change.detach()
    return dense


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_the_layer_with_the_delta_in_its_weight(base: str, variant: str) -> None:
    if variant == "lora_bias" and getattr(BASES[base](), "bias", None) is None:
        return  # nothing that the bias could be merged into
    layer, x = adapted(base, variant), input_of(base)
    assert_alike(layer(x), merged(layer)(x), TERMS)


@pytest.mark.parametrize("base", [base for base in BASES if getattr(BASES[base](), "bias", None) is not None])
@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_a_trained_bias_is_a_copy(base: str, variant: str) -> None:
    layer, x = adapted(base, variant, bias=True), input_of(base)
    before = layer.base_layer.bias.clone()
    layer(x).sum().backward()
    assert layer.parameters_of("a")["trained_bias"].grad is not None
    assert torch.equal(layer.base_layer.bias, before) and not torch.equal(layer.table("trained_bias")["a"], before)
    assert_alike(layer(x), merged(layer)(x), TERMS)
    layer.detach("a")
    assert set(layer._modules) == {"base_layer", *layer.matrices}


@pytest.mark.parametrize("base", BASES)
def test_two_variants_are_summed(base: str) -> None:
    layer, x = adapted(base, "dora"), input_of(base)
    layer.add("b", AdapterSpec(3, 0.4, neutral_start=False))
    layer.active = ("a", "b")
    dense = merged(layer)
    dense.weight.data += layer.delta_weight("b").detach()
    assert_alike(layer(x), dense(x), TERMS)


class TestDoRA:
    @given(rows=st.integers(1, 6), columns=st.integers(1, 7), r=st.integers(1, 9), scaling=st.floats(1e-3, 50))
    @settings(max_examples=50, deadline=None)
    def test_the_norms_without_the_product(self, rows: int, columns: int, r: int, scaling: float) -> None:
        torch.manual_seed(rows + columns)
        layer = LoRALinear(nn.Linear(columns, rows, dtype=torch.float64))
        layer.add("a", AdapterSpec(r, scaling, neutral_start=False), torch.float64)
        up, down = layer.factors("a")
        expected = (layer.base_layer.weight + up @ down).norm(dim=1)
        size = layer.base_layer.weight.norm(dim=1) + up.norm(dim=1) * down.norm()  # what may cancel
        # The square is off by so many units of size², and the root of what cancels by the root of that.
        units = rounding(2 * (columns + r) + 8, size.square(), torch.float64)
        assert_within(row_norms(layer, up, down, torch.float64), expected, units.sqrt())

    @pytest.mark.parametrize("base", [base for base in BASES if base != "embedding"])
    def test_gradients_are_those_of_the_definition_with_the_norm_a_constant(self, base: str) -> None:
        layer = adapted(base, "dora").double()
        if isinstance(layer.base_layer, Linear4bit):
            layer.base_layer.bias.data = layer.base_layer.bias.data.double()
        x = input_of(base).double().requires_grad_()
        own = layer.parameters_of("a")
        found = torch.autograd.grad(layer(x).sin().sum(), [x, *own.values()])
        weight = layer.as_matrix(layer.base_weight(torch.float64))
        direction = weight + 0.7 * own["lora_B"].flatten(1) @ own["lora_A"].flatten(1)
        gain = own["lora_magnitude_vector"] / direction.norm(dim=1).detach()
        dense = merged(layer).double()
        y = torch.func.functional_call(dense, {"weight": layer.as_weight(gain[:, None] * direction)}, (x,))
        expected = torch.autograd.grad(y.sin().sum(), [x, *own.values()])
        for ours, theirs in zip(found, expected, strict=True):
            # In float64, but for the gain's share of the base weight, whose squared norm is the definition's.
            assert_alike(ours.float(), theirs.float(), TERMS)

    def test_layers_together_are_the_layers_one_by_one(self) -> None:
        layers = [adapted("linear", "dora"), adapted("4bit"), adapted("linear-no-bias", "dora", r=3)]
        x = torch.randn(4, 6, requires_grad=True)
        inputs = [x, *(p for layer in layers for p in layer.parameters_of("a").values())]
        together, alone = linear_together(x, *layers), [layer(x) for layer in layers]
        assert len({y.grad_fn for y in together}) == 1
        both = [torch.autograd.grad(sum(y.sin().sum() for y in ys), inputs) for ys in (together, alone)]
        for found, expected in zip(*both, strict=True):
            assert_alike(found, expected, TERMS)

    def test_the_fused_path_is_the_written_out_one(self) -> None:
        layer, x = adapted("4bit", "dora"), input_of("4bit")
        inputs = list(layer.parameters_of("a").values())
        assert layer.can_fuse(x)
        fused = torch.autograd.grad(layer(x).square().sum(), inputs)
        written_out = torch.autograd.grad(layer.with_updates(layer.base_layer(x), x).square().sum(), inputs)
        for found, expected in zip(fused, written_out, strict=True):
            assert_alike(found, expected, TERMS)

    @pytest.mark.parametrize("base", BASES)
    def test_a_fresh_adapter_changes_next_to_nothing(self, base: str) -> None:
        module = BASES[base]().requires_grad_(False)
        layer = next(kind for kind in (LoRALinear, LoRAConv, LoRAEmbedding) if kind.fits(module))(module)
        layer.add("a", AdapterSpec(2, 1.0, variant=VARIANTS["dora"]))
        layer.active = ("a",)
        x = input_of(base)
        assert_alike(layer(x), module(x), TERMS)

    def test_a_row_of_zeros_stays_finite(self) -> None:
        base = nn.Linear(4, 3, bias=False).requires_grad_(False)
        base.weight.data[1] = 0
        layer = LoRALinear(base)
        layer.add("a", AdapterSpec(2, 1.0, variant=VARIANTS["dora"]))
        layer.active = ("a",)
        y = layer(torch.randn(5, 4))
        y.sum().backward()
        assert torch.isfinite(y).all() and not y[:, 1].any()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters_of("a").values())

    def test_small_magnitudes_count_in_bf16(self) -> None:
        """A gain of 1.002 is 1 in bf16; half of the outputs must move all the same."""
        base = nn.Linear(64, 64, bias=False).bfloat16().requires_grad_(False)
        layer = LoRALinear(base)
        layer.add("a", AdapterSpec(2, 1.0, variant=VARIANTS["dora"]))
        layer.active = ("a",)
        x = torch.randn(32, 64, dtype=torch.bfloat16)
        before = layer(x)
        layer.table("lora_magnitude_vector")["a"].data.mul_(1.003)
        assert (layer(x) != before).float().mean() > 0.3

    def test_dropout_is_on_the_whole_product(self) -> None:
        layer = adapted("linear-no-bias", "dora").train()
        layer.adapters["a"].dropout_p = 0.5
        x = torch.randn(4000, 6)
        gain = layer.gain("a", torch.float32).detach()
        mean = layer(x.abs()).detach().mean(0)
        expected = layer.eval()(x.abs()).detach().mean(0)  # dropout keeps the mean
        assert (mean - expected).abs().max() < 0.1 * gain.abs().max() * expected.abs().max()
        assert not torch.equal(layer.train()(x), layer.train()(x))

    def test_the_output_is_saved_where_there_is_no_bias(self) -> None:
        layer = adapted("linear-no-bias", "dora")
        x = torch.randn(16, 6, requires_grad=True)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
            y = layer(x)
        assert y.data_ptr() in saved


def test_evaluation_computes_the_gain_once_and_follows_every_change() -> None:
    layer, x = adapted("4bit", "dora"), input_of("4bit")
    calls: list[int] = []
    project = layer.project
    layer.project = lambda matrix: calls.append(1) or project(matrix)  # type: ignore[method-assign]
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first) and len(calls) == 1
        for parameter in layer.parameters_of("a").values():
            parameter.data[0] += 1  # which no version counter sees
            changed = layer(x)
            assert not torch.equal(changed, first)
            assert_alike(changed, merged(layer)(x), TERMS)
            first = changed


class TestHiRA:
    @pytest.mark.parametrize("base", BASES)
    def test_gradients_are_those_of_the_definition(self, base: str) -> None:
        layer = adapted(base, "hira").double()
        x = input_of(base)
        if isinstance(layer.base_layer, Linear4bit):
            layer.base_layer.bias.data = layer.base_layer.bias.data.double()
        x = x.double() if x.is_floating_point() else x
        own = list(layer.parameters_of("a").values())
        found = torch.autograd.grad(layer(x).sin().sum(), own)
        dense = merged(layer).double()
        weight = layer.as_matrix(layer.base_weight(torch.float64))
        whole = weight * (1 + 0.7 * own[1].flatten(1) @ own[0].flatten(1))
        y = torch.func.functional_call(dense, {"weight": layer.as_weight(whole)}, (x,))
        for ours, theirs in zip(found, torch.autograd.grad(y.sin().sum(), own), strict=True):
            assert_alike(ours, theirs, 3 * TERMS)

    def test_a_fresh_adapter_changes_nothing(self) -> None:
        base = nn.Linear(6, 5).requires_grad_(False)
        layer = LoRALinear(base)
        layer.add("a", AdapterSpec(2, 1.0, variant=VARIANTS["hira"]))
        layer.active, x = ("a",), torch.randn(3, 6)
        assert torch.equal(layer(x), base(x))

    def test_one_matrix_of_the_weights_size_is_kept(self) -> None:
        layer, saved = LoRALinear(Linear4bit(quantize(torch.randn(48, 64)))), list[tuple[int, ...]]()
        layer.add("a", AdapterSpec(2, 1.0, variant=VARIANTS["hira"], neutral_start=False))
        layer.active = ("a",)
        x = torch.randn(8, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
            layer(x)
        assert sum(shape in ((48, 64), (64, 48)) for shape in saved) == 1

    def test_a_rank_of_one_changes_the_weight_at_full_rank(self) -> None:
        layer = adapted("linear-no-bias", "hira", r=1)
        assert torch.linalg.matrix_rank(layer.delta_weight("a").detach()) == 5
