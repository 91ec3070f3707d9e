"""An adapted layer answers for the layer that it replaces; whoever reads its weight gets it with the update."""

import copy
import io
from typing import Any

import pytest
import torch
from made import adapt
from tolerances import assert_alike
from torch import Tensor, nn
from torch.nn.functional import linear

from lorakit import LoraConfig, add_adapter, disable_adapters, merge_adapter, set_adapter, use_rows
from lorakit.errors import AdapterError
from lorakit.layers import AdaptedLayer, Linear4bit, LoRAParameter, SavedModule, TrainedTokens
from lorakit.layers.frozen.updated_weight import UpdatedWeight

TERMS = 256  # roundings through two layers of 16 and 64 inputs
X = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))
VARIANTS = [{}, {"use_dora": True}, {"lora_bias": True}, {"variant": "hira"}, {"init_lora_weights": "pissa"}]


class Reader(nn.Module):
    """A model that multiplies by the weights of its layers instead of calling them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 8)
        self.table = nn.Embedding(10, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.first.weight, self.first.bias).to(self.first.weight.dtype)
        return y @ self.table.weight[:, :8].T


def adapted(model: nn.Module, targets: list[str], **settings: Any) -> nn.Module:
    torch.manual_seed(2)
    if "variant" in settings or "use_dora" in settings or "init_lora_weights" in settings or "lora_bias" in settings:
        add_adapter(model.requires_grad_(False), LoraConfig(r=3, target_modules=targets, **settings))
        for layer in model.modules():
            if isinstance(layer, AdaptedLayer):
                for parameter in layer.parameters_of("default").values():
                    parameter.data += 0.1 * torch.randn_like(parameter)
    else:
        adapt(model.requires_grad_(False), target_modules=targets, **settings)
    return model


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_a_model_that_multiplies_by_the_weight_itself(settings: dict[str, Any]) -> None:
    model = adapted(Reader(), ["first"], **settings)
    base = Reader()(X)
    found = model(X)
    merged = copy.deepcopy(model)
    merge_adapter(merged)
    assert not torch.equal(found, base)
    assert_alike(found, merged(X), TERMS)
    with disable_adapters(model):
        assert torch.equal(model(X), base)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_gradients_reach_the_adapter_through_the_weight(settings: dict[str, Any]) -> None:
    model = adapted(Reader(), ["first"], **settings)
    model(X).square().sum().backward()
    read = [parameter.grad for parameter in model.first.parameters_of("default").values()]
    model.zero_grad()
    (model.first(X) @ model.table.weight[:, :8].T).square().sum().backward()
    called = [parameter.grad for parameter in model.first.parameters_of("default").values()]
    assert_alike(read, called, 4 * TERMS)


def test_both_kinds_of_layers_and_several_adapters() -> None:
    model = adapted(Reader(), ["first", "table"])
    adapt(model, "other", target_modules=["first"])
    set_adapter(model, ["default", "other"])
    first = model.first.base_layer.weight + model.first.delta_weight("default") + model.first.delta_weight("other")
    table = model.table.base_layer.weight + model.table.delta_weight("default")
    assert_alike(model(X), linear(X, first, model.first.bias) @ table[:, :8].T, TERMS)


def test_what_a_weight_says_of_itself_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(Reader(), ["first"])
    monkeypatch.setattr(AdaptedLayer, "delta_weight", lambda self, name: pytest.fail("the update was computed"))
    weight, base = model.first.weight, model.first.base_layer.weight
    assert isinstance(weight, Tensor) and isinstance(weight, UpdatedWeight)
    assert (weight.dtype, weight.device, weight.shape, weight.ndim) == (base.dtype, base.device, base.shape, base.ndim)
    assert (weight.size(0), weight.dim(), weight.numel(), len(weight)) == (8, 2, 128, 8)
    assert weight.is_floating_point() and weight.is_contiguous() and weight.element_size() == 4
    assert weight.requires_grad and not weight.is_meta and weight.grad is None
    with torch.no_grad():
        assert not model.first.weight.requires_grad


def test_dtype_and_device_follow_the_base_layer() -> None:
    model = adapted(Reader(), ["first"]).to(torch.bfloat16)
    assert model.first.weight.dtype == torch.bfloat16
    assert (model.first.weight + 0).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_read_weight_is_the_merged_one_to_the_bit(dtype: torch.dtype) -> None:
    model = adapted(Reader().to(dtype), ["first"])
    read = model.first.weight.clone()
    merge_adapter(model)
    assert torch.equal(read, model.first.weight)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight.data.copy_(torch.zeros(8, 16)),
        lambda weight: weight.detach().zero_(),
        lambda weight: weight.__setitem__(0, 1.0),
        lambda weight: weight.__imul__(2),
        lambda weight: weight.data.__iadd__(2),
        lambda weight: nn.init.normal_(weight),
        lambda weight: nn.init.kaiming_uniform_(weight),
        lambda weight: setattr(weight, "data", torch.zeros(8, 16)),
    ],
)
def test_writing_to_a_read_weight_is_refused(write: Any) -> None:
    model = adapted(Reader(), ["first"])
    before = model.first.base_layer.weight.clone()
    with torch.no_grad(), pytest.raises(AdapterError, match="first, a Linear: its weight is read through an adapter"):
        write(model.first.weight)
    assert torch.equal(model.first.base_layer.weight, before)
    with disable_adapters(model), torch.no_grad():
        model.first.weight.mul_(2)
    assert torch.equal(model.first.base_layer.weight, 2 * before)


def test_a_parameter_that_is_set_goes_to_the_base_layer() -> None:
    model = adapted(Reader(), ["first"], use_dora=True)
    with torch.no_grad():
        model(X)
    weight = nn.Parameter(torch.randn(8, 16), requires_grad=False)
    model.first.weight = weight
    assert model.first.base_layer.weight is weight and "first.weight" not in model.state_dict()
    merged = copy.deepcopy(model)
    merge_adapter(merged)
    with torch.no_grad():  # what was computed from the old weight is forgotten
        assert_alike(model(X), merged(X), TERMS)


def test_rows_with_adapters_of_their_own_have_no_common_weight() -> None:
    model = adapted(Reader(), ["first"])
    with use_rows(model, ["default", "__base__"] * 2):
        assert model.first.weight.dtype == torch.float32
        with pytest.raises(AdapterError, match="first, a Linear: the model takes its weight, the same for all rows"):
            model(X)
    with use_rows(model, ["__base__"] * 4):
        assert torch.equal(model(X), Reader()(X))


def test_dropout_cannot_reach_what_is_multiplied_elsewhere() -> None:
    model = adapted(Reader(), ["first"], lora_dropout=0.5)
    model.eval()(X)
    with pytest.raises(AdapterError, match="set lora_dropout to 0"):
        model.train()(X)


def test_functions_with_a_backward_pass_of_their_own_do_not_lose_the_gradient() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            return grads[0] @ weight, grads[0].flatten(0, -2).T @ x.flatten(0, -2)

    model = adapted(Reader(), ["first"])
    y = Product.apply(X, model.first.weight)
    assert_alike(y + model.first.bias, model.first(X), TERMS)
    with pytest.raises(AdapterError, match="a backward pass of its own"):
        y.sum().backward()


# ---- other attributes ------------------------------------------------------------------------------------------------

BASES = {
    nn.Linear(16, 8): ["in_features", "out_features", "bias"],
    nn.Embedding(10, 16, padding_idx=3): ["num_embeddings", "embedding_dim", "padding_idx", "max_norm", "sparse"],
    nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=2): [
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "bias",
    ],
    Linear4bit.from_linear(nn.Linear(64, 8)): ["in_features", "out_features", "quant_type", "block_size", "packed"],
}  # fmt: skip


@pytest.mark.parametrize("base", BASES, ids=lambda base: type(base).__name__)
def test_attributes_are_those_of_the_base_layer(base: nn.Module) -> None:
    base.remark = "mine"  # type: ignore[assignment]
    model = nn.Sequential(copy.deepcopy(base))
    add_adapter(model, LoraConfig(r=2, target_modules=["0"]))
    for name in [*BASES[base], "remark"]:
        found, expected = getattr(model[0], name), getattr(model[0].base_layer, name)
        assert found is expected or found == expected, name
    for name in ("nothing", "_hf_hook"):
        with pytest.raises(AttributeError, match=name):
            getattr(model[0], name)
    assert hasattr(model[0], "weight") == hasattr(base, "weight")


def test_biases_are_those_that_forward_adds() -> None:
    model = adapted(nn.Sequential(nn.Linear(16, 8)), ["0"], lora_bias=True)
    assert_alike(model[0].bias, model[0].base_layer.bias + model[0].delta_bias("default"), 2)
    trained = nn.Sequential(nn.Linear(16, 8))
    add_adapter(trained, LoraConfig(r=2, target_modules=["0"], bias="lora_only"))
    trained[0].parameters_of("default")["trained_bias"].data += 1
    assert_alike(trained[0].bias, trained[0].base_layer.bias + 1, 4)


class Asked(nn.Linear):
    """A layer with a method and a property that read its weight."""

    @property
    def norm(self) -> Tensor:
        return self.weight.norm()

    def back(self, y: Tensor) -> Tensor:
        return self._back(y)

    def _back(self, y: Tensor) -> Tensor:
        return y @ self.weight


def test_methods_and_properties_of_the_base_layer_see_the_updated_weight() -> None:
    torch.manual_seed(0)
    model = adapted(nn.Sequential(Asked(16, 8)), ["0"])
    dense = (model[0].base_layer.weight + model[0].delta_weight("default")).detach()
    y = torch.randn(3, 8)
    for found in (model[0].back(y), model[0]._back(y)):
        assert_alike(found, y @ dense, TERMS)
    assert_alike(model[0].norm, dense.norm(), TERMS)
    with disable_adapters(model):
        assert torch.equal(model[0].back(y), y @ model[0].base_layer.weight)


def test_every_kind_of_module_answers() -> None:
    model = nn.ModuleDict(
        {"table": nn.Embedding(10, 16), "norm": nn.LayerNorm(16), "score": nn.Linear(16, 3), "router": nn.Linear(16, 4)}
    )
    config = LoraConfig(
        target_modules=[], target_parameters=["router.weight"], modules_to_save=["score", "norm"],
        trainable_token_indices={"table": [1]}, init_lora_weights=False,
    )  # fmt: skip
    add_adapter(model, config)
    kinds = {"table": TrainedTokens, "norm": SavedModule, "score": SavedModule, "router": LoRAParameter}
    assert all(isinstance(model[name], kind) for name, kind in kinds.items())
    assert (model["table"].embedding_dim, model["norm"].eps, model["score"].out_features) == (16, 1e-5, 3)
    for name, parameter in model.named_parameters():
        if "copies" in name or "delta" in name:
            parameter.data += 1
    assert torch.equal(model["table"].weight[1], model["table"].base_layer.weight[1] + 1)
    assert torch.equal(model["norm"].weight, model["norm"].base_layer.weight + 1)
    update = model["router"].delta_weight("default")
    assert_alike(model["router"].weight * 1, model["router"].base_layer.weight + update, TERMS)
    assert_alike(linear(X, model["router"].weight, model["router"].bias), model["router"](X), TERMS)
    assert model["router"].weight.shape == (4, 16)


def test_state_copies_and_pickles_stay_as_they_are() -> None:
    model = adapted(nn.Sequential(nn.Linear(16, 8)), ["0"])
    names = {"0.base_layer.weight", "0.base_layer.bias", "0.lora_A.default", "0.lora_B.default"}
    assert set(model.state_dict()) == set(dict(model.named_parameters())) == names
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(X), model(X)) and other[0].in_features == 16
        other[0].lora_B["default"].data += 1
        assert not torch.equal(other(X), model(X))


# ---- PyTorch's own readers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["linear2"]])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_transformer_encoder_of_pytorch(targets: list[str], training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = adapted(nn.TransformerEncoder(layer, 2).train(training), targets)
    with torch.no_grad():
        found, merged = model(X), copy.deepcopy(model)
        merge_adapter(merged)
        assert_alike(found, merged(X), 16 * TERMS)
        assert not torch.allclose(found, nn.TransformerEncoder(layer, 2).train(training)(X), atol=1e-3)


def test_attention_that_takes_weights() -> None:
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            biases = torch.cat([self.q.bias, self.k.bias, self.v.bias])
            y: Tensor = nn.functional.multi_head_attention_forward(
                x, x, x, 16, 2, None, biases, None, None, False, 0.0, self.out.weight, self.out.bias,
                use_separate_proj_weight=True, q_proj_weight=self.q.weight, k_proj_weight=self.k.weight,
                v_proj_weight=self.v.weight,
            )[0]  # fmt: skip
            return y

    model = adapted(Attention(), ["q", "v", "out"])
    merged = copy.deepcopy(model)
    merge_adapter(merged)
    assert_alike(model(X), merged(X), 4 * TERMS)
    model(X).square().sum().backward()
    assert all(getattr(model, name).lora_B["default"].grad.any() for name in ("q", "v", "out"))


def test_compiled_reader() -> None:
    model = adapted(Reader(), ["first"])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_alike(compiled(X), model(X), TERMS)
