"""LoRALinear against the closed form, and its hand-written gradients against finite differences."""

import pytest
import torch
from tolerances import assert_alike, assert_within, rounding
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lorakit.errors import ShapeError
from lorakit.layers import AdapterSpec, Linear4bit, LoRALinear, linear_together
from lorakit.quantization import quantize

# Roundings through a layer and back: sums over at most 16 inputs, 3 ranks, 8 outputs, 3 ranks and 8 tokens, and the
# functions between; those of three layers are added up.
TERMS = 64


def make_layer(
    base: nn.Linear | Linear4bit,
    r: int = 3,
    scaling: float = 0.7,
    dropout_p: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> LoRALinear:
    base.requires_grad_(False)
    layer = LoRALinear(base)
    layer.add("default", AdapterSpec(r, scaling, dropout_p, neutral_start=False), dtype)
    layer.active = ("default",)
    return layer


def linear4bit(out_features: int, in_features: int, bias: bool = True) -> Linear4bit:
    dense = nn.Linear(in_features, out_features, bias=bias)
    return Linear4bit(quantize(dense.weight), dense.bias.detach() if bias else None)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("base", ["dense", "4bit"])
def test_gradcheck_in_float64(base: str, bias: bool, dropout_p: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5, bias=bias).double() if base == "dense" else linear4bit(5, 6, bias)
    layer = make_layer(linear, dtype=torch.float64, dropout_p=dropout_p)
    if linear.bias is not None:
        linear.bias.data = linear.bias.data.double()
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    a, b = layer.lora_A["default"], layer.lora_B["default"]

    def forward(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return torch.func.functional_call(layer, {"lora_A.default": a, "lora_B.default": b}, (x,))

    assert torch.autograd.gradcheck(forward, (x, a, b))


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7), (1, 1, 7)])
def test_forward_is_the_closed_form_for_any_leading_shape(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    layer = make_layer(nn.Linear(7, 4))
    x = torch.randn(shape)
    expected = x @ (layer.base_layer.weight + layer.delta_weight("default")).T + layer.base_layer.bias
    assert_alike(layer(x), expected, TERMS)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_fused_and_written_out_paths_agree(dropout_p: float) -> None:
    torch.manual_seed(2)
    layer = make_layer(linear4bit(8, 6), dropout_p=dropout_p)
    x = torch.randn(5, 6, requires_grad=True)
    inputs = [x, layer.lora_A["default"], layer.lora_B["default"]]
    torch.manual_seed(3)
    fused = torch.autograd.grad(layer(x).square().sum(), inputs)
    layer.add("zero", AdapterSpec(2, 1.0))
    layer.active = ("default", "zero")  # two adapters take the written-out path; the second adds nothing
    torch.manual_seed(3)
    written_out = torch.autograd.grad(layer(x).square().sum(), inputs)
    for ours, theirs in zip(fused, written_out, strict=True):
        assert_alike(ours, theirs, TERMS)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_the_adapters_backward_takes_4_n_r_in_plus_out_flops(dropout_p: float) -> None:
    tokens, r, in_features, out_features = 32, 4, 48, 80
    layer = make_layer(nn.Linear(in_features, out_features, bias=False), r=r, dropout_p=dropout_p)
    x = torch.randn(tokens, in_features, requires_grad=True)
    y = layer(x)
    in_place = {torch.ops.aten.addmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * b[1]}  # torch's table has only addmm
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        y.sum().backward()
    base = 2 * tokens * in_features * out_features  # dy W
    assert counter.get_total_flops() - base == 4 * tokens * r * (in_features + out_features)


def three_layers(dtype: torch.dtype = torch.float32) -> list[LoRALinear]:
    """Layers of one width, but other sizes, ranks, scalings and bases."""
    torch.manual_seed(5)
    bases = [linear4bit(5, 6), nn.Linear(6, 3, bias=False), linear4bit(8, 6, bias=False)]
    layers = [
        make_layer(base.to(dtype), r, s, dtype=dtype)
        for base, r, s in zip(bases, (2, 1, 3), (0.5, 2.0, 1.0), strict=True)
    ]
    layers[0].base_layer.bias.data = layers[0].base_layer.bias.data.to(dtype)
    return layers


def matrices(layers: list[LoRALinear]) -> list[torch.Tensor]:
    return [table["default"] for layer in layers for table in (layer.lora_A, layer.lora_B)]


def test_layers_together_are_the_layers_one_by_one() -> None:
    layers = three_layers()
    x = torch.randn(2, 4, 6, requires_grad=True)
    inputs = [x, *matrices(layers)]
    together, alone = linear_together(x, *layers), [layer(x) for layer in layers]
    assert len({y.grad_fn for y in together}) == 1  # one function computed them
    for found, expected in zip(together, alone, strict=True):
        assert_alike(found, expected, TERMS)
    ours, theirs = (torch.autograd.grad(sum(y.sin().sum() for y in ys), inputs) for ys in (together, alone))
    for found, expected in zip(ours, theirs, strict=True):
        assert_alike(found, expected, TERMS)


def test_gradcheck_of_layers_together_in_float64() -> None:
    layers = three_layers(torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: linear_together(x, *layers), (x, *matrices(layers)))


def test_a_result_that_nobody_uses_sends_no_gradient() -> None:
    layers = three_layers()
    x = torch.randn(4, 6, requires_grad=True)
    linear_together(x, *layers)[1].sum().backward()
    assert not layers[0].lora_A["default"].grad.any() and layers[1].lora_A["default"].grad.any()


def test_layers_with_hooks_or_without_adapter_are_called_as_they_are() -> None:
    layers, seen = three_layers(), []
    x = torch.randn(4, 6)
    expected = [layer(x) for layer in layers]
    layers[1].register_forward_hook(lambda *_: seen.append(1))
    for found, y in zip(linear_together(x, *layers), expected, strict=True):
        assert_alike(found, y, TERMS)
    assert seen == [1]
    layers[2].active = ()
    dense = nn.Linear(6, 2)
    assert torch.equal(linear_together(x, layers[2], dense)[0], layers[2].base_layer(x))
    assert torch.equal(linear_together(x, layers[2], dense)[1], dense(x))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_x_is_saved_once_in_its_own_dtype(dropout_p: float) -> None:
    layer = make_layer(nn.Linear(64, 32).bfloat16(), r=2, dropout_p=dropout_p)
    x = torch.randn(16, 64, dtype=torch.bfloat16, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    activations = {t.data_ptr(): t for t in saved if not isinstance(t, nn.Parameter) and t.numel() > 1}  # not the seed
    assert {(tuple(t.shape), t.dtype) for t in activations.values()} == {
        ((16, 64), torch.bfloat16),
        ((16, 2), torch.bfloat16),
    }


def test_an_unfrozen_base_still_gets_its_gradient() -> None:
    layer = make_layer(nn.Linear(4, 3))
    layer.base_layer.requires_grad_(True)
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.base_layer.weight.grad is not None


def test_dropout_acts_on_the_adapter_only_and_only_in_training() -> None:
    torch.manual_seed(3)
    layer = make_layer(nn.Linear(16, 4), dropout_p=0.5)
    x = torch.randn(8, 16)
    assert not torch.equal(layer.train()(x), layer.train()(x))
    merged = layer.base_layer.weight + layer.delta_weight("default")
    assert_alike(layer.eval()(x), x @ merged.T + layer.base_layer.bias, TERMS)
    layer.lora_B["default"].data.zero_()
    assert_alike(layer.train()(x), layer.base_layer(x), TERMS)


def test_layers_that_read_the_same_x_drop_the_same_of_it() -> None:
    x, layers = torch.randn(9, 6), three_layers()
    for layer in layers:
        layer.adapters["default"].dropout_p = 0.3
    torch.manual_seed(4)
    found = linear_together(x, *layers)
    for y, layer in zip(found, layers, strict=True):
        torch.manual_seed(4)
        assert_alike(y, layer(x), TERMS)
    layers[1].adapters["default"].dropout_p = 0.0  # then each draws for itself
    assert_alike(linear_together(x, *layers)[1], layers[1](x), TERMS)


def test_dropout_keeps_the_mean() -> None:
    layer = make_layer(nn.Linear(64, 8, bias=False).bfloat16(), dropout_p=0.1)
    layer.base_layer.weight.data.zero_()
    x = torch.randn(4, 64).bfloat16()
    mean = torch.stack([layer(x).float() for _ in range(4000)]).mean(0).detach()
    expected = (x.double() @ layer.delta_weight("default").detach().T.double()).float()
    # Each of 4000 draws of an output varies by p / (1 - p)·Σ(x·w)²: six standard deviations of their mean. To it comes
    # the rounding of each draw to bf16, and of A, B, x A and what is dropped of x before.
    products = (x.double()[:, None] * layer.delta_weight("default").detach().double()).square().sum(-1)
    magnitude = x.double().abs() @ (0.7 * layer.lora_B["default"].abs() @ layer.lora_A["default"].abs()).double().T
    assert_within(mean, expected, 6 * (products * 0.1 / 0.9 / 4000).sqrt() + rounding(5, magnitude, torch.bfloat16))


def test_a_fresh_adapter_changes_nothing() -> None:
    base = nn.Linear(16, 4).requires_grad_(False)
    layer = LoRALinear(base)
    layer.add("default", AdapterSpec(2, 1.0))
    layer.active = ("default",)
    x = torch.randn(8, 16)
    assert torch.equal(layer(x), base(x))
    assert layer.lora_A["default"].abs().max() <= 16**-0.5


def test_a_wrong_width_names_both_shapes() -> None:
    with pytest.raises(ShapeError, match=r"LoRALinear\(6 -> 5\) got x of shape \(2, 7\)"):
        make_layer(nn.Linear(6, 5))(torch.randn(2, 7))


@pytest.mark.parametrize("base", ["dense", "4bit"])
def test_autocast_picks_the_dtypes(base: str) -> None:
    torch.manual_seed(4)
    layer = make_layer(nn.Linear(6, 5) if base == "dense" else linear4bit(5, 6))
    x = torch.randn(3, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == (torch.bfloat16 if base == "dense" else torch.float32)  # a 4-bit layer answers in x's dtype
    weights = layer.base_layer.dense_weight(torch.float32) if base == "4bit" else layer.base_layer.weight
    factors = 0.7 * layer.lora_B["default"].abs() @ layer.lora_A["default"].abs()
    magnitude = x.abs() @ (weights.abs() + factors).T + layer.base_layer.bias.abs()
    assert_within(y, layer(x), rounding(8, magnitude, torch.bfloat16))  # x, W, A, B, x A, the scaled B, two sums
    y.float().sum().backward()
    assert x.grad.dtype == layer.lora_A["default"].grad.dtype == torch.float32


def test_x_that_can_be_computed_again_is_not_kept() -> None:
    layers, source = three_layers(), torch.randn(5, 6, requires_grad=True)
    results = []
    for recompute in (None, (torch.tanh, (source,))):
        kept: list[int] = []

        def keep(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.data_ptr())
            return tensor

        x = source.tanh()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = linear_together(x, *layers, recompute=recompute)
        assert (x.data_ptr() in kept) is (recompute is None)
        loss = torch.cat(y, dim=-1).square().sum()
        results.append([*y, *torch.autograd.grad(loss, [source, *matrices(layers)])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("is_4bit", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_an_update_of_zero_keeps_the_output_of_rows_in_any_order(bias: bool, is_4bit: bool) -> None:
    """PyTorch rounds the sum with a bias otherwise if the rows are not contiguous."""
    torch.manual_seed(0)
    dense = nn.Linear(64, 48, bias=bias)
    layer = make_layer(Linear4bit.from_linear(dense) if is_4bit else dense, r=4)
    nn.init.zeros_(layer.lora_B["default"])
    for x in (torch.randn(2, 7, 64).transpose(0, 1), torch.randn(64, 9).T, torch.randn(2, 64, 3, 4).movedim(1, -1)):
        assert torch.equal(layer(x), layer.base_layer(x))
