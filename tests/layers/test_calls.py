"""Base layers that only a call can compute: hooked ones, subclasses, parametrized and patched ones."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from made import added, one_layer
from tolerances import assert_alike
from torch import Tensor, nn

from lorakit import LoraConfig, add_adapter, disable_adapters, use_rows
from lorakit.errors import AdapterError
from lorakit.layers import Linear4bit, linear_together
from lorakit.layers.frozen.calls import has_hooks

TERMS = 64  # roundings of a layer with 16 inputs, rank 3, and what the classes below add
VARIANTS = [{}, {"use_dora": True}, {"lora_bias": True}, {"variant": "hira"}, {"init_lora_weights": "pissa"}]
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(16, 8)


def four_bit() -> nn.Module:
    torch.manual_seed(0)
    return Linear4bit.from_linear(nn.Linear(16, 8), block_size=32)


class WithAttribute(nn.Linear):
    """A subclass that only adds an attribute."""

    remark = "nothing else"


class Doubled(nn.Linear):
    """A subclass with another product."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class WithOption(nn.Linear):
    """A subclass that takes more than its input."""

    def forward(self, input: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return super().forward(input) * scale + shift


class Codes(nn.Linear):
    """A layer in 8 bits of its own, as quantizing libraries make them: weight = codes * scale."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features)
        self.scale = nn.Parameter(dense.weight.abs().max() / 127, requires_grad=False)
        self.bias = dense.bias
        self.weight = nn.Parameter((dense.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype) * self.scale, self.bias)


class TopRouter(nn.Linear):
    """A router: returns the scores of the best experts only, their numbers, and all logits."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = super().forward(input)
        best, chosen = logits.topk(2, dim=-1)
        return best.softmax(-1), chosen, logits


class Grouped(nn.Linear):
    """A block-diagonal product, (..., groups, in) -> (..., groups, out / groups)."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.einsum("...gi,goi->...go", input, self.weight.view(2, -1, self.in_features))


class SamePadding(nn.Conv2d):
    """A convolution that pads its input itself."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))


class Standardized(nn.Conv2d):
    """A convolution that normalizes its weight in each pass."""

    def forward(self, input: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), True)) / self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight, self.bias)


class Transposed(nn.Conv1d):
    """A convolution over (batch, length, channels)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


# ---- hooks -----------------------------------------------------------------------------------------------------------


def add_hundred(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output + 100


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("make", [linear, four_bit])
@pytest.mark.parametrize("is_late", [False, True])
def test_forward_hook_on_the_base_layer_runs_once(
    make: Callable[[], nn.Module], settings: dict[str, Any], is_late: bool
) -> None:
    base, calls = make(), list[Tensor]()
    plain = one_layer(copy.deepcopy(base), **settings)

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(inputs[0])
        return output + 100

    handle = None if is_late else base.register_forward_hook(hook)
    model = one_layer(base, **settings)
    handle = handle or base.register_forward_hook(hook)
    calls.clear()
    found = model(X)
    assert len(calls) == 1 and torch.equal(calls[0], X)
    assert_alike(found, plain(X) + 100, TERMS)
    handle.remove()
    assert_alike(model(X), plain(X), TERMS)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_hooks_before_a_call_and_in_the_backward_pass(settings: dict[str, Any]) -> None:
    base, gradients = linear(), list[Tensor]()
    plain = one_layer(copy.deepcopy(base), **settings)
    base.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    base.register_full_backward_hook(lambda module, inputs, outputs: gradients.append(outputs[0]))
    model = one_layer(base, **settings)
    x = X.clone().requires_grad_()
    y = model(x)
    y.sum().backward()
    assert len(gradients) == 1
    with disable_adapters(model):
        shifted = model(X)
    assert_alike(y, shifted + added(plain, X), TERMS)


def test_global_hooks_see_the_base_layer() -> None:
    model, seen = one_layer(linear()), list[nn.Module]()
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        model(X)
    finally:
        handle.remove()
    assert model[0].base_layer in seen
    assert not has_hooks(model[0].base_layer)


def test_forward_of_one_object_that_somebody_patched() -> None:
    base = linear()
    plain = one_layer(copy.deepcopy(base))
    original = base.forward
    base.forward = lambda input: original(input) - 7  # type: ignore[method-assign]
    assert_alike(one_layer(base)(X), plain(X) - 7, TERMS)


def test_forward_of_a_class_that_somebody_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    model, original = one_layer(linear()), nn.Linear.forward
    expected = model(X) - 7
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: original(self, input) - 7)
    assert_alike(model(X), expected, TERMS)


def test_layers_that_share_an_input_are_called_if_one_has_hooks() -> None:
    first, second = one_layer(linear()), one_layer(linear())
    expected = first(X), second(X) + 100
    second[0].base_layer.register_forward_hook(add_hundred)
    assert_alike(linear_together(X, first[0], second[0]), expected, TERMS)
    second[0].forward = lambda x: x  # type: ignore[method-assign] # as accelerate does it
    assert linear_together(X, first[0], second[0])[1] is X


def test_a_hook_that_multiplies_leaves_the_update_alone() -> None:
    base = linear()
    base.register_forward_hook(lambda module, inputs, output: 3 * output)
    for settings in VARIANTS:
        model = one_layer(copy.deepcopy(base), **settings)
        with disable_adapters(model):
            alone = model(X)
        assert_alike(model(X), alone + added(model, X), TERMS)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_hooks_under_rows_of_several_adapters(settings: dict[str, Any]) -> None:
    base = linear()
    plain = one_layer(copy.deepcopy(base), **settings)
    base.register_forward_hook(add_hundred)
    model = one_layer(base, **settings)
    names = ["default", "__base__", "default", "__base__"]
    with use_rows(model, names), use_rows(plain, names):
        assert_alike(model(X), plain(X) + 100, TERMS)


# ---- subclasses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_subclass_that_only_adds_attributes(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base = WithAttribute(16, 8)
    assert_alike(one_layer(base, **settings)(X), one_layer(linear(), **settings)(X), TERMS)


@pytest.mark.parametrize("kind", [Doubled, WithOption])
def test_update_is_added_to_what_a_subclass_computes(kind: type[nn.Linear]) -> None:
    torch.manual_seed(0)
    model = one_layer(kind(16, 8))
    with disable_adapters(model):
        alone = model(X)
    assert_alike(model(X), alone + added(model, X), TERMS)
    model[0].lora_A["default"].grad = None
    model(X).sum().backward()
    assert torch.isfinite(model[0].lora_A["default"].grad).all() and model[0].lora_A["default"].grad.any()


def test_further_arguments_reach_the_base_layer() -> None:
    torch.manual_seed(0)
    model = one_layer(WithOption(16, 8))
    layer = model[0]
    assert_alike(layer(X, 3.0, shift=1.0), layer.base_layer(X, 3.0, shift=1.0) + added(model, X), TERMS)
    assert torch.equal(layer(input=X), layer(X))
    with use_rows(model, ["default", "__base__"] * 2):
        assert_alike(layer(X, 3.0)[1], layer.base_layer(X, 3.0)[1], TERMS)
        with pytest.raises(AdapterError, match="only a single tensor can be divided into rows"):
            layer(X, torch.ones(4, 1))
    with pytest.raises(TypeError):
        one_layer(linear())[0](X, 3.0)


@pytest.mark.parametrize("name", ["input", "x"])
def test_input_by_name(name: str) -> None:
    base = linear() if name == "input" else four_bit()
    model = one_layer(base)
    assert torch.equal(model[0](**{name: X}), model(X))


def test_quantized_subclass_keeps_its_own_product() -> None:
    model = one_layer(Codes(linear()))  # type: ignore[arg-type]
    with disable_adapters(model):
        alone = model(X)
    assert_alike(model(X), alone + added(model, X), TERMS)
    with use_rows(model, ["default"] * 4):
        assert_alike(model(X), alone + added(model, X), TERMS)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"variant": "hira"}, {"init_lora_weights": "pissa"}], ids=str)
@pytest.mark.parametrize("base", [Codes(linear()), Doubled(16, 8)], ids=["codes", "another product"])  # type: ignore[arg-type]
def test_values_of_the_weight_that_nobody_knows_are_not_made_up(base: nn.Module, settings: dict[str, Any]) -> None:
    model = nn.Sequential(copy.deepcopy(base))
    with pytest.raises(AdapterError, match=r"0 is a (Codes|Doubled), which .* needs the values of the weight"):
        add_adapter(model, LoraConfig(r=3, target_modules=["0"], **settings))
    assert type(model[0]) is type(base)


class Multiplied(nn.Linear):
    """A subclass whose own forward is the product after all."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_values_of_a_weight_are_known_where_forward_is_the_product(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    torch.random.set_rng_state(state)
    assert_alike(one_layer(Multiplied(16, 8), **settings)(X), one_layer(linear(), **settings)(X), TERMS)


@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}], ids=str)
def test_router_chooses_with_the_updated_weight(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = one_layer(TopRouter(16, 8), **settings)
    dense = TopRouter(16, 8)
    dense.load_state_dict(model[0].base_layer.state_dict())
    dense.weight.data += model[0].delta_weight("default")
    offset = model[0].delta_bias("default")
    dense.bias.data += 0 if offset is None else offset
    for _ in range(2):  # the first call finds out what the layer returns
        for one, other in zip(model(X), dense(X), strict=True):
            assert_alike(one, other, TERMS) if one.is_floating_point() else torch.equal(one, other)
    model(X)[0].square().sum().backward()
    assert model[0].lora_A["default"].grad.any() and model[0].lora_B["default"].grad.any()
    with disable_adapters(model):
        assert torch.equal(model(X)[2], model[0].base_layer(X)[2])
    with use_rows(model, ["default", "__base__"] * 2), pytest.raises(AdapterError, match="its output has no rows"):
        model(X)


def test_router_in_eight_bits_is_refused() -> None:
    class CodedRouter(Codes):
        def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            logits = super().forward(input)
            return logits.softmax(-1), logits

    model = one_layer(CodedRouter(linear()))  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="0, a CodedRouter: only a layer with a dense weight"):
        model(X)


def test_grouped_product() -> None:
    torch.manual_seed(0)
    model, x = one_layer(Grouped(16, 8)), torch.randn(3, 2, 16)
    dense = copy.deepcopy(model[0].base_layer)
    dense.weight.data += model[0].delta_weight("default")
    assert_alike(model(x), dense(x), TERMS)


@pytest.mark.parametrize("settings", VARIANTS[:2] + VARIANTS[3:4], ids=str)
@pytest.mark.parametrize("kind", [SamePadding, Standardized, Transposed])
def test_convolution_computes_with_the_updated_weight(kind: type[nn.Conv2d], settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = one_layer(kind(3, 5, 3 if kind is not Transposed else 1), **settings)
    x = IMAGES if kind is not Transposed else IMAGES[:, :, :, 0].transpose(1, 2)
    dense = copy.deepcopy(model[0].base_layer)
    dense.weight.data += model[0].delta_weight("default")
    assert_alike(model(x), dense(x), TERMS)
    model(x).square().sum().backward()
    assert all(parameter.grad.any() for parameter in model[0].parameters_of("default").values())


def test_dropout_that_cannot_be_applied_is_refused_in_training() -> None:
    torch.manual_seed(0)
    model = one_layer(Standardized(3, 5, 3), lora_dropout=0.5)
    model.eval()(IMAGES)
    with pytest.raises(AdapterError, match=r"0, a Standardized: the model takes its weight.*lora_dropout"):
        model.train()(IMAGES)


def test_output_that_no_update_fits_is_refused() -> None:
    base = linear()
    model = one_layer(base)
    base.register_forward_hook(lambda module, inputs, output: (output, None))
    with pytest.raises(AdapterError, match=r"0, a Linear, gave no tensor of shape \(4, 8\)"):
        model(X)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("make", [linear, four_bit])
def test_a_model_may_change_the_output_in_place(make: Callable[[], nn.Module], settings: dict[str, Any]) -> None:
    model = one_layer(make(), **settings)
    pulled = []
    for is_in_place in (False, True):
        x = X.clone().requires_grad_()
        torch.manual_seed(0)
        y = model(x)
        y = y.add_(1).mul_(2) if is_in_place else (y + 1) * 2
        pulled.append(torch.autograd.grad(y.square().sum(), [x, *model[0].parameters_of("default").values()]))
    assert all(torch.equal(one, other) for one, other in zip(*pulled, strict=True))
