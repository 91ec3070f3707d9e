"""Gradients of gradients: every layer, variant and fused path against its definition, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from definitions import BASES, DOUBLE, KINDS, SCALING, TERMS, Pair, defined, derivatives, input_of, make_layer, summed
from lorakit_kernels import drop
from tolerances import assert_gradients_alike, assert_within, rounding
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lorakit.errors import GradientError
from lorakit.layers import VARIANTS, AdaptedLayer, AdapterSpec, Linear4bit, linear_cross_entropy, linear_together
from lorakit.layers.dropout import draw_seed
from lorakit.layers.row_adapters import BASE, RowAdapters
from lorakit.quantization import quantize

LEADING = {"linear": [(3,), (2, 3), (2, 1, 3), ()], "4bit": [(3,), (2, 3), (2, 1, 3)]}


@pytest.mark.parametrize(("base", "variant"), KINDS)
def test_three_derivatives_of_every_layer_and_variant(base: str, variant: str) -> None:
    torch.manual_seed(0)
    layer = make_layer(base, variant)
    for leading in LEADING.get(base, [(2, 3)]):
        pair = Pair(layer, input_of(base, *leading))
        found, expected = (derivatives(loss, pair.tensors) for loss in pair.losses)
        assert_gradients_alike(found, expected, TERMS)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", ["plain", "lora_bias", "hira", "residual"])  # DoRA's norms are no function of A, B
def test_finite_differences_of_the_gradient(base: str, variant: str) -> None:
    if (base, variant) not in KINDS:
        return
    torch.manual_seed(0)
    pair = Pair(make_layer(base, variant), input_of(base, 2))
    assert gradcheck(pair.ours, pair.tensors, check_batched_grad=True)
    assert gradgradcheck(pair.ours, pair.tensors, check_batched_grad=True)


def test_autograd_functional() -> None:
    torch.manual_seed(0)
    for base, variant in (("linear", "dora"), ("4bit-no-bias", "plain"), ("conv", "plain"), ("embedding", "residual")):
        pair = Pair(make_layer(base, variant), input_of(base))
        tensors, functional = tuple(tensor.detach() for tensor in pair.tensors), torch.autograd.functional
        expected = functional.hessian(pair.losses[1], tensors)
        for options in ({}, {"vectorize": True}, {"vectorize": True, "outer_jacobian_strategy": "forward-mode"}):
            for row, expected_row in zip(functional.hessian(pair.losses[0], tensors, **options), expected, strict=True):
                assert_gradients_alike(row, expected_row, TERMS)
        for product in (functional.hvp, functional.vhp):
            found, by_definition = (product(loss, tensors, tensors)[1] for loss in pair.losses)
            assert_gradients_alike(found, by_definition, TERMS)
        assert_gradients_alike(*(functional.jvp(f, tensors, tensors)[1:] for f in pair.functions), TERMS)


COMBINATIONS = list(itertools.product(["plain", "dora"], [0.0, 0.4], [False, True], [False, True]))


@pytest.mark.parametrize(("variant", "dropout_p", "frozen_a", "recomputes"), COMBINATIONS)
@pytest.mark.parametrize("used", [slice(None), slice(1, 2)])
def test_layers_that_share_x(variant: str, dropout_p: float, frozen_a: bool, recomputes: bool, used: slice) -> None:
    torch.manual_seed(1)
    if variant == "dora" and dropout_p:
        return  # not fused: `test_dropout_under_a_gain` has it
    kinds = [("linear", variant, 2), ("4bit-no-bias", "plain", 3), ("linear-no-bias", variant, 1), ("4bit", variant, 2)]
    layers = [make_layer(base, name, r, dropout_p).train() for base, name, r in kinds]
    source = torch.randn(2, 4, 6, dtype=DOUBLE, requires_grad=True)
    parameters = [layer.parameters_of("a") for layer in layers]
    for own in parameters:
        own["lora_A"].requires_grad_(not frozen_a)
    wanted = [source, *(tensor for own in parameters for tensor in own.values() if tensor.requires_grad)]
    torch.manual_seed(2)
    mask = drop(torch.ones(2, 4, 6, dtype=DOUBLE), draw_seed(), dropout_p) / (1 - dropout_p)

    def ours(*_: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        return linear_together(source.tanh(), *layers, recompute=(torch.tanh, (source,)) if recomputes else None)[used]

    def theirs(*_: Tensor) -> list[Tensor]:
        x = source.tanh()
        return [defined(layer, own, x, mask) for layer, own in zip(layers, parameters, strict=True)][used]

    assert len({y.grad_fn for y in ours()}) == 1  # one function computes them all
    found, expected = (derivatives(summed(function), wanted) for function in (ours, theirs))
    assert_gradients_alike(found, expected, TERMS)
    ys = [torch.cat([y.flatten() for y in function()]) for function in (ours, theirs)]
    vectors = torch.randn(3, len(ys[0]), dtype=DOUBLE)
    found, expected = (torch.autograd.grad(y, wanted, vectors, is_grads_batched=True, allow_unused=True) for y in ys)
    for one, other in zip(found, expected, strict=True):
        if other is None:  # not used: the layers' function has one gradient for all that it computes
            assert not one.any()
        else:
            assert_gradients_alike([one], [other], TERMS)


def test_dropout_under_a_gain() -> None:
    torch.manual_seed(1)
    layer = make_layer("linear", "dora", dropout_p=0.4).train()
    x = torch.randn(5, 6, dtype=DOUBLE, requires_grad=True)
    wanted = [x, *layer.parameters_of("a").values()]

    def loss(*_: Tensor) -> Tensor:
        torch.manual_seed(2)
        return layer(x).sin().sum()

    torch.manual_seed(2)
    mask = drop(torch.ones(5, 6, dtype=DOUBLE), draw_seed(), 0.4) / 0.6

    def by_definition(*_: Tensor) -> Tensor:
        own, base = layer.parameters_of("a"), layer.base_layer
        change = SCALING * own["lora_B"] @ own["lora_A"]
        gain = own["lora_magnitude_vector"] / (base.weight + change).detach().norm(dim=1)
        # The base's product with the whole x, and (g - 1) of it with the dropped x, as in PEFT.
        y = x @ base.weight.T + base.bias + ((gain - 1) * (mask * x @ base.weight.T) + gain * (mask * x @ change.T))
        return y.sin().sum()

    found, expected = derivatives(loss, wanted), derivatives(by_definition, wanted)
    assert_gradients_alike(found, expected, TERMS)


def test_a_row_whose_gain_is_zero_has_no_nan() -> None:
    layer = make_layer("linear-no-bias", "dora")
    layer.parameters_of("a")["lora_magnitude_vector"].data[1] = 0.0
    pair = Pair(layer, input_of("linear"))
    assert all(one.isfinite().all() for one in derivatives(pair.losses[0], pair.tensors))


@pytest.mark.parametrize("base", ["linear", "4bit"])
def test_layers_on_each_other_under_checkpoint(base: str) -> None:
    torch.manual_seed(3)
    first, second = make_layer(base), make_layer("linear")
    second.parameters_of("a")["lora_A"].data = first.parameters_of("a")["lora_A"].data
    second.lora_A["a"] = first.lora_A["a"]  # a parameter of both: x of the second depends on it too
    last = nn.Linear(5, 6, bias=False).double().requires_grad_(False)
    x = torch.randn(3, 6, dtype=DOUBLE, requires_grad=True)
    wanted = [x, *first.parameters_of("a").values(), second.lora_B["a"]]

    def block(x: Tensor) -> Tensor:
        y: Tensor = second(last(first(x).tanh()))
        return y

    def defined_block(x: Tensor) -> Tensor:
        y = defined(first, first.parameters_of("a"), x).tanh()
        return defined(second, second.parameters_of("a"), last(y))

    expected = derivatives(lambda *_: defined_block(x).sin().sum(), wanted)
    plain = derivatives(lambda *_: block(x).sin().sum(), wanted)
    again = derivatives(lambda *_: checkpoint(block, x, use_reentrant=False).sin().sum(), wanted)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().numpy(), torch.from_numpy):
        from_host = derivatives(lambda *_: block(x).sin().sum(), wanted)
    for found in (plain, again, from_host):
        assert_gradients_alike(found, expected, TERMS)


def test_a_gradient_penalty_trains_as_by_the_definition() -> None:
    torch.manual_seed(4)
    pair = Pair(make_layer("4bit-no-bias", "dora"), input_of("4bit"))
    results = []
    for function in pair.functions:
        own = [tensor.detach().clone().requires_grad_() for tensor in pair.tensors]
        loss = summed(function)(*own)
        loss = (
            loss + torch.stack([one.square().sum() for one in torch.autograd.grad(loss, own, create_graph=True)]).sum()
        )
        loss.backward()
        results.append([tensor.grad for tensor in own])
    assert_gradients_alike(*results, TERMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_dtypes_are_near_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    pair = Pair(make_layer("4bit-no-bias"), input_of("4bit"))
    results = []
    for tensors in (pair.tensors, [tensor.detach().to(dtype).requires_grad_() for tensor in pair.tensors]):
        gradients = torch.autograd.grad(pair.losses[0](*tensors), tensors, create_graph=True)
        again = torch.autograd.grad(torch.stack([one.sin().sum() for one in gradients]).sum(), tensors)
        results.append([one.detach().double() for one in (*gradients, *again)])
    for exact, found in zip(*results, strict=True):  # some thirty roundings on the way, next to the largest element
        assert_within(found, exact, rounding(30, 2 * exact.abs().max(), dtype))


def test_what_is_kept_for_the_backward_pass_stays_the_same() -> None:
    layer = make_layer("linear", "dora")
    x = torch.randn(3, 6, dtype=DOUBLE, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    activations = {tuple(t.shape) for t in saved if t.dim() == 2 and not isinstance(t, nn.Parameter)}
    assert activations == {(3, 2), (3, 5), (3, 6)}  # u, z and x


def test_the_fused_loss_refuses_a_second_derivative_and_nothing_else() -> None:
    torch.manual_seed(6)
    hidden, weight = torch.randn(5, 8, dtype=DOUBLE, requires_grad=True), torch.randn(11, 8, dtype=DOUBLE)
    targets, factor = torch.randint(11, (5,)), torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)
    loss = factor * linear_cross_entropy(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    expected = cross_entropy(hidden @ weight.T, targets, reduction="sum")
    (by_definition,) = torch.autograd.grad(factor * expected, hidden, create_graph=True)
    assert_gradients_alike([gradient], [by_definition], TERMS)
    (of_factor,) = torch.autograd.grad(gradient.sin().sum(), factor, retain_graph=True)  # it is linear in the factor
    (expected_of_factor,) = torch.autograd.grad(by_definition.sin().sum(), factor, retain_graph=True)
    assert_gradients_alike([of_factor], [expected_of_factor], TERMS)
    with pytest.raises(GradientError, match=r"linear_cross_entropy has no second .* torch\.nn\.functional\.cross_ent"):
        torch.autograd.grad(gradient.sum(), hidden)


@pytest.mark.parametrize("names", [["a", "b"], ["b", BASE, "b"], ["c", "a", "b", "c"]])
@pytest.mark.parametrize("base", ["linear", "4bit", "conv", "embedding"])
def test_rows_of_several_adapters(base: str, names: list[str]) -> None:
    torch.manual_seed(7)
    layer = make_layer(base)
    for name, variant in (("b", "dora"), ("c", "residual")):
        layer.add(name, AdapterSpec(3, SCALING, variant=VARIANTS[variant], neutral_start=False), DOUBLE)
        for parameter in layer.parameters_of(name).values():
            parameter.data += 0.2 * torch.randn(parameter.shape, dtype=DOUBLE)
    x = torch.cat([input_of(base, 1, 3)[:1] for _ in names])
    wanted = [p for name in dict.fromkeys(names) if name != BASE for p in layer.parameters_of(name).values()]
    wanted += [x.requires_grad_()] if x.is_floating_point() else []

    def by_rows(*_: Tensor) -> Tensor:
        layer.rows = RowAdapters(names)
        try:
            result: Tensor = layer(x).sin().sum()
            return result
        finally:
            layer.rows = None

    def one_by_one(*_: Tensor) -> Tensor:
        rows = zip(x.split(1), names, strict=True)
        ys = [layer.base_layer(row) if name == BASE else _alone(layer, name, row) for row, name in rows]
        return torch.cat(ys).sin().sum()

    assert_gradients_alike(derivatives(by_rows, wanted), derivatives(one_by_one, wanted), TERMS)


def _alone(layer: AdaptedLayer, name: str, x: Tensor) -> Tensor:
    """Return the definition's result for x with another adapter than "a"."""
    adapters = layer.adapters
    layer.adapters = {"a": adapters[name]}
    try:
        return defined(layer, dict(adapters[name].parameters), x)
    finally:
        layer.adapters = adapters


def test_layers_with_another_compute_dtype() -> None:
    torch.manual_seed(8)
    layer = make_layer("4bit")
    layer.base_layer = Linear4bit(quantize(torch.randn(5, 6)), torch.randn(5).double(), compute_dtype=DOUBLE)
    pair = Pair(layer, input_of("4bit"))
    found, expected = (derivatives(loss, pair.tensors) for loss in pair.losses)
    assert_gradients_alike(found, expected, TERMS)
