"""torch.func and forward-mode differentiation of every layer and variant, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from definitions import BASES, DOUBLE, KINDS, TERMS, Pair, input_of, make_layer, summed
from lorakit_kernels import is_transformed
from made import small_decoder
from tolerances import assert_gradients_alike
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.functional import cross_entropy

import lorakit as lk
from lorakit.errors import GradientError
from lorakit.layers import AdapterSpec, Linear4bit, linear_cross_entropy, linear_together
from lorakit.layers.row_adapters import RowAdapters
from lorakit.quantization import quantize


def arguments(pair: Pair) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return tuple(tensor.detach() for tensor in pair.tensors), tuple(range(len(pair.tensors)))


def stacked(pair: Pair) -> tuple[Tensor, ...]:
    return tuple(torch.stack([tensor.detach(), 2 * tensor.detach(), -tensor.detach()]) for tensor in pair.tensors)


@pytest.mark.parametrize(("base", "variant"), KINDS)
def test_derivatives_of_every_kind(base: str, variant: str) -> None:
    torch.manual_seed(0)
    pair = Pair(make_layer(base, variant), input_of(base, 2, 3))
    tensors, indices = arguments(pair)
    for transform in (grad, jacrev, jacfwd):
        functions = pair.losses if transform is grad else pair.functions
        found, expected = (transform(function, argnums=indices)(*tensors) for function in functions)
        assert_gradients_alike(found, expected, TERMS)
    rows, by_definition = (hessian(loss, argnums=indices)(*tensors) for loss in pair.losses)
    for row, expected_row in zip(rows, by_definition, strict=True):
        assert_gradients_alike(row, expected_row, TERMS)
    assert_gradients_alike(*(jvp(function, tensors, tensors) for function in pair.functions), TERMS)


@pytest.mark.parametrize(("base", "variant"), KINDS)
def test_many_adapters_and_inputs_at_once(base: str, variant: str) -> None:
    torch.manual_seed(0)
    layer = make_layer(base, variant)
    pair = Pair(layer, input_of(base, 2, 3))
    _, indices = arguments(pair)
    stacks = stacked(pair)
    assert_gradients_alike(*(vmap(grad(loss, argnums=indices))(*stacks) for loss in pair.losses), TERMS)
    with torch.no_grad():
        before = pair.ours(*pair.tensors)
        assert_gradients_alike(*([vmap(function)(*stacks)] for function in pair.functions), TERMS)
        assert torch.equal(pair.ours(*pair.tensors), before)  # nothing of the transform is left behind
    y, expected = (function(*pair.tensors) for function in pair.functions)
    vectors = torch.randn(3, *y.shape, dtype=DOUBLE)

    def products(y: Tensor) -> tuple[Tensor, ...]:  # the vmap of autograd.grad, as in PyTorch's tutorial on Jacobians
        return vmap(lambda vector: torch.autograd.grad(y, pair.tensors, vector, retain_graph=True))(vectors)

    assert_gradients_alike(products(y), products(expected), TERMS)


@pytest.mark.parametrize("base", BASES)
def test_forward_mode(base: str) -> None:
    torch.manual_seed(0)
    for variant in ("plain", "hira"):
        pair = Pair(make_layer(base, variant), input_of(base, 2))
        assert gradcheck(pair.ours, pair.tensors, check_forward_ad=True, check_batched_forward_grad=True)
    assert not is_transformed()
    with forward_ad.dual_level():
        assert is_transformed()


@pytest.mark.parametrize("four_bit", [False, True])
def test_gradients_of_each_sample(four_bit: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    if four_bit:
        model[0], model[2] = (Linear4bit.from_linear(model[index]) for index in (0, 2))
    lk.add_adapter(model, lk.LoraConfig(r=2, target_modules=["0", "2"]))
    own = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in own.values():
        parameter += torch.randn_like(parameter) / 4
    x = torch.randn(7, 6)
    each = vmap(grad(lambda p, row: functional_call(model, p, (row[None],)).sin().sum()), (None, 0))(own, x)
    for index, row in enumerate(x):
        expected = torch.autograd.grad(model(row[None]).sin().sum(), lk.adapter_parameters(model))
        assert_gradients_alike([each[name][index] for name in own], expected, 64)


def test_layers_that_share_x() -> None:
    torch.manual_seed(0)
    layers = [make_layer("linear"), make_layer("4bit-no-bias", "dora"), make_layer("4bit", r=3)]
    x = torch.randn(4, 6, dtype=DOUBLE)
    found = grad(summed(lambda x: linear_together(x.tanh(), *layers, recompute=(torch.tanh, (x,)))))(x)
    expected = grad(summed(lambda x: tuple(layer(x.tanh()) for layer in layers)))(x)
    assert_gradients_alike([found], [expected], TERMS)


def test_dropout_follows_the_randomness_of_vmap() -> None:
    layer = make_layer("linear", dropout_p=0.5).train()
    layer.base_layer.weight.data.zero_()
    x = torch.ones(64, 6, dtype=DOUBLE)
    same, different = (vmap(lambda row: layer(row[None])[0], randomness=kind)(x) for kind in ("same", "different"))
    assert torch.equal(same, same[:1].expand_as(same)) and not torch.equal(
        different, different[:1].expand_as(different)
    )
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(layer)(x)


@pytest.mark.parametrize("names", [["a", "b"], ["b", "__base__", "b", "a"]])
@pytest.mark.parametrize("base", ["linear", "4bit", "conv", "embedding"])
def test_rows_of_several_adapters(base: str, names: list[str]) -> None:
    torch.manual_seed(0)
    layer = make_layer(base, "dora")
    layer.add("b", AdapterSpec(3, 0.5, neutral_start=False), DOUBLE)
    x = input_of(base)[:1].expand(len(names), *input_of(base).shape[1:]).clone()
    layer.rows = RowAdapters(names)
    tables = [(table, name) for name in "ab" for table in layer.parameters_of(name)]
    tensors = tuple(layer.parameters_of(name)[table].detach() for table, name in tables)

    def forward(*tensors: Tensor) -> Tensor:
        named = {f"{table}.{name}": tensor for (table, name), tensor in zip(tables, tensors, strict=True)}
        result: Tensor = functional_call(layer, named, (x,))
        return result

    stacks = tuple(torch.stack([tensor, tensor / 2]) for tensor in tensors)
    indices = tuple(range(len(tensors)))
    by_stack = vmap(grad(summed(forward), argnums=indices))(*stacks)
    with torch.no_grad():
        results = vmap(forward)(*stacks)
    for index, factor in enumerate((1.0, 0.5)):
        given = [(factor * tensor).requires_grad_() for tensor in tensors]
        expected = torch.autograd.grad(summed(forward)(*given), given)
        assert_gradients_alike([gradients[index] for gradients in by_stack], expected, TERMS)
        with torch.no_grad():  # the stacks that are kept without gradient are those of other tensors
            assert_gradients_alike([results[index]], [forward(*given)], TERMS)


def test_the_fused_loss() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8, dtype=DOUBLE), torch.randn(11, 8, dtype=DOUBLE)
    targets = torch.randint(11, (5,))
    losses = torch.zeros(5, dtype=DOUBLE)
    found = hessian(lambda h: linear_cross_entropy(h, weight, targets))(hidden)
    expected = hessian(lambda h: cross_entropy(h @ weight.T, targets, reduction="sum"))(hidden)
    assert_gradients_alike([found], [expected], TERMS)
    with forward_ad.dual_level():
        linear_cross_entropy(hidden, weight, targets, losses)
    assert_gradients_alike([losses], [cross_entropy(hidden @ weight.T, targets, reduction="none")], TERMS)


def decoder(dropout_p: float = 0.0, **options: object) -> lk.Decoder:
    torch.manual_seed(0)
    model = small_decoder().double()
    config = lk.LoraConfig(r=2, target_modules="all-linear", lora_dropout=dropout_p, **options)
    lk.add_adapter(model, config, dtype=DOUBLE)
    for parameter in lk.adapter_parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, dtype=DOUBLE)
    return model.train()


@pytest.mark.parametrize("checkpointing", ["none", "mlp", "layer"])
@pytest.mark.parametrize("norms", [False, True])
def test_a_decoder(norms: bool, checkpointing: str) -> None:
    model = decoder(modules_to_save=["input_layernorm", "post_attention_layernorm"] if norms else None)
    ids, targets = torch.randint(1, 40, (2, 7)), torch.randint(1, 40, (2, 7))
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted, values = list(own.values()), {name: parameter.detach() for name, parameter in own.items()}

    def loss(p: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, p, (ids[None],))[0], targets)

    each = vmap(grad(loss), (None, 0, 0))(values, ids, targets)
    for layer in model.model.layers:
        layer.checkpointing = checkpointing
    gradients = torch.autograd.grad(
        cross_entropy(model(ids).flatten(0, 1), targets.flatten()), wanted, create_graph=True
    )
    assert_gradients_alike([one.mean(0) for one in each.values()], gradients, TERMS)
    product = torch.autograd.grad(torch.stack([one.sin().sum() for one in gradients]).sum(), wanted)
    vector = {name: one.cos().detach() for name, one in zip(own, gradients, strict=True)}

    def mean_loss(p: dict[str, Tensor]) -> Tensor:
        return torch.stack([loss(p, *row) for row in zip(ids, targets, strict=True)]).mean()

    _, expected = jvp(grad(mean_loss), (values,), (vector,))
    assert_gradients_alike(product, list(expected.values()), TERMS)
    y, vectors = model(ids), torch.randn(3, 2, 7, model.config.vocab_size, dtype=DOUBLE)
    one_by_one = [torch.autograd.grad(y, wanted, vector, retain_graph=True) for vector in vectors]
    batched = torch.autograd.grad(y, wanted, vectors, is_grads_batched=True, retain_graph=True)
    mapped = vmap(lambda vector: torch.autograd.grad(y, wanted, vector, retain_graph=True))(vectors)
    for found in (batched, mapped):
        assert_gradients_alike(found, [torch.stack(rows) for rows in zip(*one_by_one, strict=True)], TERMS)


def test_what_a_recomputed_part_dropped_is_refused_in_a_transform() -> None:
    model = decoder(dropout_p=0.5)
    for layer in model.model.layers:
        layer.checkpointing = "layer"
    y, wanted = model(torch.randint(1, 40, (1, 7))), lk.adapter_parameters(model)
    with pytest.raises(GradientError, match="switch off dropout or activation checkpointing"):
        vmap(lambda v: torch.autograd.grad(y, wanted, v, retain_graph=True), randomness="same")(
            torch.randn(2, *y.shape)
        )


def test_a_compiled_transform() -> None:
    layer = make_layer("4bit", "plain").float()
    layer.base_layer = Linear4bit(quantize(torch.randn(5, 6)), torch.randn(5))
    own = {name: value.detach() for name, value in layer.named_parameters() if value.requires_grad}
    x = torch.randn(3, 6)
    each = vmap(grad(lambda p, row: functional_call(layer, p, (row[None],)).sin().sum()), (None, 0))
    found, expected = torch.compile(each, backend="aot_eager")(own, x), each(own, x)
    assert_gradients_alike(list(found.values()), list(expected.values()), 64)
