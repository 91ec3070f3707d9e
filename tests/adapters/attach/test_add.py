"""Attaching, switching, disabling and removing adapters: the base is never touched, a failure changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from made import ARCHITECTURES, small_decoder
from tolerances import assert_alike
from torch import Tensor, nn

from lorakit import (
    Linear4bit,
    LoraConfig,
    LoRALinear,
    adapter_parameters,
    add_adapter,
    disable_adapters,
    quantize,
    remove_adapter,
    set_adapter,
    set_trained,
)
from lorakit.adapters import adapter_configs, count_parameters, lora_layers
from lorakit.errors import AdapterError, ConfigError

# Roundings through `mlp`: sums over 6, 8 and 8 inputs and up to 8 ranks each, and weights with an update added.
TERMS = 6 + 8 + 8 + 3 * 12


Snapshot = tuple[dict[str, int], dict[str, bytes], list[str]]


def snapshot(model: nn.Module) -> Snapshot:
    """What must not change: which module object is where, every byte, which adapters there are."""
    modules = {path: id(module) for path, module in model.named_modules(remove_duplicate=False)}
    tensors = {name: t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for name, t in state(model)}
    return modules, tensors, list(adapter_configs(model))


def state(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, t.reshape(-1)) for name, t in [*model.named_parameters(), *model.named_buffers()]]


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4, bias=False)))


def config(**values: Any) -> LoraConfig:
    return LoraConfig(r=2, init_lora_weights=False, **values)


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, Callable[[], nn.Module]] = {
    "sequential": mlp,
    "4bit": lambda: nn.Sequential(Linear4bit(quantize(torch.randn(8, 6))), nn.Linear(8, 4)),
    **{name: (lambda changes=changes: small_decoder(**changes)) for name, changes in ARCHITECTURES.items()},
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_add_and_remove_give_back_the_same_objects_and_bytes(build: Callable[[], nn.Module]) -> None:
    model = build()
    before = snapshot(model)
    add_adapter(model, config())
    assert lora_layers(model)
    add_adapter(model, config(), "other")
    remove_adapter(model)
    assert lora_layers(model).keys() == lora_layers(model, "other").keys() != set()
    remove_adapter(model, "other")
    assert snapshot(model) == before


def test_the_base_keeps_its_bytes_while_it_is_adapted() -> None:
    model = small_decoder(**ARCHITECTURES["llama-biases-tied"])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    add_adapter(model, config())
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    after = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if ".lora_" not in name}
    assert after.keys() == before.keys() and all(torch.equal(t, before[name]) for name, t in after.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does() -> None:
    model = mlp()
    expected = model(X)
    add_adapter(model, LoraConfig(r=2))
    assert torch.equal(model(X), expected)
    add_adapter(model, config(), "trained")
    assert not torch.allclose(model(X), expected)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 16 / 4), (True, 16 / 2)])
def test_scaling_patterns_and_the_closed_form(rslora: bool, scaling: float) -> None:
    model = mlp()
    dense = copy.deepcopy(model)
    options = {"rank_pattern": {"0": 4}, "alpha_pattern": {r"2\.0": 5.0}}
    report = add_adapter(
        model,
        LoraConfig(
            r=4, lora_alpha=16, use_rslora=rslora, init_lora_weights=False, **options | {"rank_pattern": {r"2\.1": 1}}
        ),
    )
    assert report.ranks == {"0": 4, "2.0": 4, "2.1": 1}
    layers = lora_layers(model)
    assert layers["0"].scaling["default"] == scaling
    assert layers["2.0"].scaling["default"] == pytest.approx(5 / (2 if rslora else 4))
    assert layers["2.1"].scaling["default"] == 16
    for path, layer in layers.items():
        dense.get_submodule(path).weight.data += layer.delta_weight("default").detach()
    assert_alike(model(X), dense(X), TERMS)


def test_the_report_counts() -> None:
    model = mlp()
    report = add_adapter(model, config())
    assert report.modules == ["0", "2.0", "2.1"]
    assert report.matched == {"all-linear": ["0", "2.0", "2.1"]}
    assert report.trainable == 2 * (6 + 8 + 8 + 8 + 8 + 4) == sum(p.numel() for p in adapter_parameters(model))
    assert report.total == report.trainable + sum(p.numel() for p in mlp().parameters())
    assert "trainable params: 84 || all params: 244 || trainable%: 34.4262" in str(report)


@pytest.mark.parametrize("odd", [False, True])
def test_four_bit_and_tied_weights_count_as_what_they_stand_for(odd: bool) -> None:
    size = (7, 3) if odd else (8, 6)
    layer = Linear4bit(quantize(torch.randn(size)), torch.zeros(size[0]))
    assert count_parameters(nn.Sequential(layer)) == size[0] * size[1] + size[0]
    tied = small_decoder(tie_word_embeddings=True)
    assert count_parameters(tied) == count_parameters(small_decoder()) - 400 * 32


def test_the_init_is_repeatable_and_in_model_order() -> None:
    first, second = mlp(), mlp()
    for model, targets in ((first, ["0", "2.1"]), (second, ["2.1", "0"])):
        torch.manual_seed(7)
        add_adapter(model, config(target_modules=targets))
    ours, theirs = adapter_parameters(first), adapter_parameters(second)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_dtype_and_mode_of_new_layers() -> None:
    model = mlp().bfloat16().eval()
    add_adapter(model, config())
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    assert not any(module.training for module in model.modules())
    add_adapter(model, config(), "small", dtype=torch.bfloat16)
    assert {p.dtype for p in adapter_parameters(model, "small")} == {torch.bfloat16}
    assert model(X.bfloat16()).dtype == torch.bfloat16


class TestRefusals:
    def refused(self, model: nn.Module, wrong: LoraConfig, name: str = "new") -> str:
        before = snapshot(model)
        trainable = [p.requires_grad for p in model.parameters()]
        with pytest.raises(AdapterError) as caught:
            add_adapter(model, wrong, name)
        assert snapshot(model) == before
        assert [p.requires_grad for p in model.parameters()] == trainable
        return str(caught.value)

    @pytest.mark.parametrize("model", [mlp(), small_decoder()])
    @pytest.mark.parametrize("adapted", [False, True])
    @pytest.mark.parametrize(
        "wrong",
        [
            config(target_modules=["q_porj", "0"]),
            config(target_modules="q_porj"),
            config(target_modules="("),
            config(target_modules=[]),
            config(target_modules=["0", "q_proj"], layers_to_transform=[99]),
            config(exclude_modules=".*"),
            config(exclude_modules="*"),
            config(rank_pattern={"zzz": 2, "(": 3}),
            config(alpha_pattern={"zzz": 2, "(": 3}),
        ],
    )
    def test_a_config_that_does_not_fit_changes_nothing(
        self, wrong: LoraConfig, adapted: bool, model: nn.Module
    ) -> None:
        model = copy.deepcopy(model)
        if adapted:
            add_adapter(model, config(), "old")
        self.refused(model, wrong)

    def test_a_bad_pattern_that_only_a_later_layer_reaches(self) -> None:
        message = self.refused(mlp(), config(rank_pattern={"0": 2, "(": 3}))
        assert "'(' is not a regular expression" in message

    def test_the_nearest_name_is_given(self) -> None:
        message = self.refused(small_decoder(), config(target_modules=["q_porj", "v_proj", "xyzzy"]))
        assert "no module matches 'q_porj'; did you mean 'q_proj'?" in message
        assert "no module matches 'xyzzy'\n" in message
        assert "v_proj'" not in message
        names = "embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"
        assert f"adaptable layers here: {names}" in message

    def test_a_name_that_is_taken(self) -> None:
        model = mlp()
        add_adapter(model, config())
        assert "already has an adapter 'default'" in self.refused(model, config(), "default")

    @pytest.mark.parametrize(
        "name", ["", "a.b", "train", "eval", "keys", "items", "float", "training", "__class__", "__base__"]
    )
    def test_names_that_torch_cannot_hold(self, name: str) -> None:
        assert "cannot name an adapter" in self.refused(mlp(), config(), name)

    def test_models_without_a_linear_layer(self) -> None:
        for model in (nn.Sequential(nn.ReLU()), nn.Linear(3, 3), nn.Embedding(3, 3)):
            assert "no linear layer" in self.refused(model, config())

    @pytest.mark.parametrize(
        "values",
        [
            {"r": 0},
            {"lora_alpha": 0},
            {"lora_alpha": float("inf")},
            {"lora_dropout": 1.0},
            {"bias": "some"},
            {"modules_to_save": [3]},
            {"init_lora_weights": "pisa"},
            {"rank_pattern": {"x": 0}},
            {"alpha_pattern": {"x": 0}},
        ],
        ids=str,
    )
    def test_settings_out_of_range(self, values: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(values))):
            LoraConfig(**values)

    @pytest.mark.parametrize(
        ("variant", "message"),
        [
            ("hiar", "did you mean 'hira'"),
            ("dora", "PEFT has a setting of its own for 'dora': use_dora=true"),
            ("residual", "'residual' is not a variant"),
        ],
    )
    def test_a_variant_that_cannot_be_named(self, variant: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            LoraConfig(variant=variant)

    def test_neutral_values_of_what_is_not_supported(self) -> None:
        LoraConfig(use_dora=False, bias="none", modules_to_save=[])
        LoraConfig(modules_to_save=None)


class TestSwitching:
    def two(self) -> nn.Sequential:
        model = mlp()
        add_adapter(model, config(), "a")
        add_adapter(model, config(target_modules=["2.1"]), "b")
        return model

    def trained(self, model: nn.Module) -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad}

    def test_the_last_one_added_is_active_and_trained_alone(self) -> None:
        assert self.trained(self.two()) == {"2.1.lora_A.b", "2.1.lora_B.b"}

    def test_set_trained_trains_that_one_alone(self) -> None:
        model = self.two()
        set_adapter(model, "a")
        set_trained(model, "a")
        assert self.trained(model) == {f"{path}.lora_{m}.a" for path in ("0", "2.0", "2.1") for m in "AB"}
        model(X).sum().backward()
        assert all(p.grad is not None for p in adapter_parameters(model, "a"))
        assert all(p.grad is None for p in adapter_parameters(model, "b"))

    def test_two_adapters_are_summed_in_any_order_and_once(self) -> None:
        model, dense = self.two(), mlp()
        for path, layer in lora_layers(model).items():
            for name in layer.lora_A:
                dense.get_submodule(path).weight.data += layer.delta_weight(name).detach()
        for names in (["a", "b"], ["b", "a"], ("a", "b", "a")):
            set_adapter(model, names)
            assert_alike(model(X), dense(X), TERMS)
        set_trained(model, ["a", "b"])
        assert len(self.trained(model)) == 8

    def test_switching_back_and_forth_repeats_to_the_bit(self) -> None:
        model = self.two()
        outputs = {name: (set_adapter(model, name), model(X))[1] for name in ("a", "b")}
        for name in ("b", "a", "b"):
            set_adapter(model, name)
            assert torch.equal(model(X), outputs[name])

    def test_no_adapter_at_all(self) -> None:
        model = self.two()
        set_adapter(model, [])
        assert torch.equal(model(X), mlp()(X))
        set_trained(model, [])
        assert self.trained(model) == set()

    def test_an_unknown_name_changes_nothing(self) -> None:
        model = self.two()
        before = self.trained(model), model(X)
        with pytest.raises(AdapterError, match=r"no adapter 'c' \(attached: a, b\)"):
            set_adapter(model, ["a", "c"])
        with pytest.raises(AdapterError, match="no adapter 'aa'"):
            remove_adapter(model, "aa")
        assert (self.trained(model), True) == (before[0], torch.equal(model(X), before[1]))

    def test_did_you_mean(self) -> None:
        model = mlp()
        add_adapter(model, config(), "french")
        with pytest.raises(AdapterError, match="no adapter 'frensh'; did you mean 'french'"):
            set_adapter(model, "frensh")

    def test_an_adapters_name_can_be_used_again_after_its_removal(self) -> None:
        model = self.two()
        remove_adapter(model, "b")
        assert torch.equal(model(X), mlp()(X))  # the active one is gone; "a" waits to be chosen
        add_adapter(model, LoraConfig(r=5), "b")
        assert lora_layers(model)["0"].lora_A["b"].shape == (5, 6)


class TestDisabling:
    def test_within_the_context_it_is_the_base(self) -> None:
        model = mlp()
        expected = model(X)
        add_adapter(model, config())
        adapted = model(X)
        with disable_adapters(model) as same:
            assert same is model and torch.equal(model(X), expected)
            with disable_adapters(model):
                assert torch.equal(model(X), expected)
            assert torch.equal(model(X), expected)
        assert torch.equal(model(X), adapted)

    def test_an_exception_restores(self) -> None:
        model = mlp()
        add_adapter(model, config())
        adapted = model(X)
        with pytest.raises(ZeroDivisionError), disable_adapters(model):
            raise ZeroDivisionError
        assert torch.equal(model(X), adapted)

    def test_a_model_without_adapters(self) -> None:
        with disable_adapters(mlp()) as model:
            model(X)

    def test_removing_one_meanwhile(self) -> None:
        model = mlp()
        add_adapter(model, config(), "a")
        add_adapter(model, config(), "b")
        set_adapter(model, ["a", "b"])
        with disable_adapters(model):
            remove_adapter(model, "a")
        both = model(X)
        set_adapter(model, "b")
        assert torch.equal(model(X), both)


class TestUnusualModels:
    def test_a_layer_in_two_places_is_adapted_in_both(self) -> None:
        shared = nn.Linear(6, 6)
        model = nn.Sequential(shared, nn.ReLU(), shared)
        expected, before = model(X), snapshot(model)
        report = add_adapter(model, config())
        assert report.modules == ["0"]
        assert model[0] is model[2] and isinstance(model[0], LoRALinear)
        assert not torch.allclose(model(X), expected)
        remove_adapter(model)
        assert snapshot(model) == before

    def test_a_layer_called_base_layer_is_a_layer(self) -> None:
        model = nn.ModuleDict({"head": nn.ModuleDict({"base_layer": nn.Linear(3, 3)})})
        assert add_adapter(model, config()).modules == ["head.base_layer"]
        assert add_adapter(model, config(), "second").modules == ["head.base_layer"]

    def test_torchs_own_attention_reads_a_weight_that_must_stay(self) -> None:
        model = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        report = add_adapter(model, LoraConfig(r=2))
        assert report.modules == ["linear1", "linear2"]
        model.train()(torch.randn(2, 3, 8)).sum().backward()

    def test_deep_copies_are_independent(self) -> None:
        model = mlp()
        add_adapter(model, config())
        twin = copy.deepcopy(model)
        remove_adapter(twin)
        assert list(adapter_configs(model)) == ["default"] and not adapter_configs(twin)
        assert not torch.allclose(twin(X), model(X))
