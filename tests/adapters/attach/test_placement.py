"""What an adapter trains besides low-rank updates: modules in full, rows of tokens, biases, experts, tied weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from made import small_decoder
from tolerances import SMALL_DECODER, assert_alike
from torch import Tensor, nn

from lorakit import LoraConfig, add_adapter, disable_adapters, load_adapter, remove_adapter, save_adapter, set_adapter
from lorakit.adapters import adapter_parameters, lora_layers
from lorakit.errors import AdapterError, CheckpointError, ConfigError
from lorakit.layers import Linear4bit
from lorakit.models.decoder.loss import summed_loss

IDS = torch.tensor([[1, 2, 3, 4, 1], [7, 8, 9, 2, 2]])


def config(**values: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | values)


@torch.no_grad()
def shake(model: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in adapter_parameters(model):
        parameter.add_(torch.randn_like(parameter) / 5)


class Experts(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.first, self.second = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_transposed:
            return ((x @ self.first).relu() @ self.second).mean(0)
        return ((x @ self.second.mT).relu() @ self.first.mT).mean(0)


def experts(is_transposed: bool) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"experts": Experts(is_transposed)})


EVERYTHING = {
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "tokens": {"trainable_token_indices": [2, 7]},
    "bias-all": {"bias": "all"},
    "bias-lora": {"bias": "lora_only"},
    "embedding": {"target_modules": ["embed_tokens", "lm_head"]},
    "dora": {"use_dora": True},
    "lora-bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("values", EVERYTHING.values(), ids=EVERYTHING)
def test_attach_train_save_load_remove(values: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    if tied and "modules_to_save" in values:
        values = values | {"ensure_weight_tying": False}
    model, other = (small_decoder(attention_bias=True, tie_word_embeddings=tied).requires_grad_(False) for _ in "ab")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {path: id(module) for path, module in model.named_modules(remove_duplicate=False)}
    expected = model(IDS)
    report = add_adapter(model, config(**values))
    assert report.trainable == sum(p.numel() for p in adapter_parameters(model)) > 0
    shake(model)
    loss = summed_loss(model, IDS[0], IDS[0].roll(-1), [5])
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter_parameters(model))
    changed = model(IDS)
    assert not torch.allclose(changed, expected)
    with disable_adapters(model):
        assert torch.equal(model(IDS), expected)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(other, tmp_path / "adapter")
    assert_alike(other(IDS), changed, SMALL_DECODER)
    for each in (model, other):
        remove_adapter(each)
        assert torch.equal(each(IDS), expected)
    assert {path: id(module) for path, module in model.named_modules(remove_duplicate=False)} == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


class TestTied:
    def test_a_copy_of_a_tied_table_has_to_be_said(self) -> None:
        model = small_decoder(tie_word_embeddings=True)
        with pytest.raises(AdapterError, match=r"shares its weight with lm_head; set ensure_weight_tying"):
            add_adapter(model, config(modules_to_save=["embed_tokens"]))

    def test_a_tied_copy_is_trained_from_both_ends_and_written_once(self, tmp_path: Path) -> None:
        model = small_decoder(tie_word_embeddings=True)
        add_adapter(model, config(modules_to_save=["embed_tokens"], ensure_weight_tying=True))
        shake(model)
        (copy,) = (p for p in adapter_parameters(model) if p.shape == model.model.embed_tokens.base_layer.weight.shape)
        hidden = model.hidden_states(IDS)
        assert_alike(model(IDS), hidden @ copy.T, SMALL_DECODER)
        folder = save_adapter(model, tmp_path / "adapter")
        other = small_decoder(tie_word_embeddings=True)
        load_adapter(other, folder)
        assert_alike(other(IDS), model(IDS), SMALL_DECODER)

    def test_trained_rows_are_the_heads_rows_too(self) -> None:
        model = small_decoder(tie_word_embeddings=True)
        add_adapter(model, config(trainable_token_indices=[3]))
        shake(model)
        rows = next(p for p in adapter_parameters(model) if p.shape[0] == 1)
        table = model.model.embed_tokens.base_layer.weight.clone()
        table[3] = rows[0]
        assert_alike(model(IDS), model.hidden_states(IDS) @ table.T, SMALL_DECODER)


class TestExperts:
    @pytest.mark.parametrize("is_transposed", [False, True])
    @pytest.mark.parametrize("names", [["first"], ["second"], ["first", "second"]])
    def test_forward_finds_the_updated_parameters(self, names: list[str], is_transposed: bool) -> None:
        model, plain = (nn.Sequential(experts(is_transposed)["experts"]) for _ in "ab")
        x = torch.randn(5, 4)
        values = config(target_modules=[], target_parameters=[f"0.{name}" for name in names])
        report = add_adapter(model, values)
        assert report.parameters == {f"0.{name}": [f"0.{name}"] for name in names}
        for layer in lora_layers(model).values():
            getattr(plain[0], layer.parameter).data += layer.delta_weight("default").detach()
        assert_alike(model(x), plain(x), SMALL_DECODER)
        model(x).sum().backward()
        assert all(p.grad is not None for p in adapter_parameters(model))

    def test_each_expert_has_its_own_update_of_the_rank(self) -> None:
        model = nn.Sequential(experts(False)["experts"])
        add_adapter(model, config(target_modules=[], target_parameters=["first"]))
        (layer,) = lora_layers(model).values()
        delta = layer.delta_weight("default").detach()
        assert delta.shape == (3, 4, 6) and [int(torch.linalg.matrix_rank(d)) for d in delta] == [2, 2, 2]
        up, down = layer.factors("default")
        assert_alike(up @ down, delta, terms=8)

    def test_two_adapters_on_other_parameters_and_back(self, tmp_path: Path) -> None:
        model, x = nn.Sequential(experts(True)["experts"]), torch.randn(5, 4)
        inner, expected = model[0], model(x)
        add_adapter(model, config(target_modules=[], target_parameters=["second"]), "a")
        add_adapter(model, config(target_modules=[], target_parameters=["first", "second"]), "b")
        output = model(x)
        save_adapter(model, tmp_path / "b", "b")
        other = nn.Sequential(experts(True)["experts"])
        load_adapter(other, tmp_path / "b")
        assert_alike(other(x), output, SMALL_DECODER)
        set_adapter(model, "a")
        remove_adapter(model, "b")
        assert not torch.allclose(model(x), expected)
        remove_adapter(model, "a")
        assert model[0] is inner and torch.equal(model(x), expected)

    @pytest.mark.parametrize("values", [{"use_dora": True}, {"lora_dropout": 0.1}, {"init_lora_weights": "pissa"}])
    def test_what_a_parameter_cannot_have(self, values: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="target_parameters takes plain LoRA"):
            config(target_parameters=["first"], **values)


class TestRefusals:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (
                {"modules_to_save": ["lm_haed"]},
                "no module matches 'lm_haed' of modules_to_save; did you mean 'lm_head'",
            ),
            ({"trainable_token_indices": [1, 1]}, "expected different tokens"),
            ({"trainable_token_indices": [400]}, "below 400"),
            ({"trainable_token_indices": {"wte": [4]}}, "finds no embedding table"),
            ({"target_parameters": ["q_proj.wieght"]}, "no parameter matches 'q_proj.wieght'"),
            ({"target_parameters": ["q_proj.weight"]}, "at once"),
            ({"modules_to_save": ["q_proj"]}, "no module matches 'q_proj'"),
            ({"layers_to_transform": [0, 9]}, r"names \[9\], but the adapted layers have the numbers \[0\]"),
            ({"rank_pattern": {"k_proj": 3}}, "no adapted layer matches the pattern 'k_proj'; did you mean 'q_proj'"),
            ({"alpha_pattern": {"q_porj": 3.0}}, "no adapted layer matches the pattern 'q_porj'"),
        ],
    )
    def test_what_matches_nothing_is_named(self, values: dict[str, Any], message: str) -> None:
        model = small_decoder()
        modules, before = dict(model.named_modules()), model(IDS)
        with pytest.raises(AdapterError, match=message):
            add_adapter(model, config(**values))
        assert dict(model.named_modules()) == modules and torch.equal(model(IDS), before)

    def test_two_copies_of_one_module_cannot_both_be_active(self) -> None:
        model = small_decoder()
        for name in ("a", "b"):
            add_adapter(model, config(modules_to_save=["lm_head"]), name)
        set_adapter(model, ["a", "b"])
        with pytest.raises(AdapterError, match="only one can be active"):
            model(IDS)

    def test_a_weight_in_4_bits_cannot_be_trained(self) -> None:
        model = small_decoder()
        mlp = model.get_submodule("model.layers.1.mlp")
        mlp.down_proj = Linear4bit.from_linear(mlp.down_proj)
        for name, path in (("mlp", "model.layers.1.mlp"), ("down_proj", "model.layers.1.mlp.down_proj")):
            with pytest.raises(AdapterError, match=f"^{path} of modules_to_save is in 4 bits"):
                add_adapter(model, config(modules_to_save=[name]))

    @pytest.mark.parametrize("is_quantized", [False, True])
    def test_biases_in_fp32_of_a_model_in_bf16(self, is_quantized: bool) -> None:
        model = small_decoder(architectures=["Qwen2ForCausalLM"]).bfloat16()
        if is_quantized:
            attention = model.get_submodule("model.layers.0.self_attn")
            attention.k_proj = Linear4bit.from_linear(attention.k_proj)
        before = model(IDS)
        add_adapter(model, config(bias="all", init_lora_weights=True))
        assert torch.equal(model(IDS), before)
        model(IDS).float().sum().backward()
        for layer in range(2):
            bias = model.get_parameter(f"model.layers.{layer}.self_attn.k_proj.copies.default.bias")
            assert bias.dtype == torch.float32 and bias.grad is not None and bias.grad.dtype == torch.float32

    def test_a_module_that_another_adapter_holds_otherwise(self) -> None:
        model = small_decoder()
        add_adapter(model, config(target_modules=["lm_head"]), "a")
        with pytest.raises(AdapterError, match="already a LoRALinear of another adapter"):
            add_adapter(model, config(modules_to_save=["lm_head"]), "b")


class TestFiles:
    def saved(self, folder: Path, **values: Any) -> Path:
        model = small_decoder()
        add_adapter(model, config(**values))
        return save_adapter(model, folder)

    def test_a_pickle_is_refused_with_the_reason(self, tmp_path: Path) -> None:
        folder = self.saved(tmp_path / "adapter")
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        with pytest.raises(CheckpointError, match=r"adapter_model.bin is a pickle, which can run any code"):
            load_adapter(small_decoder(), folder)

    def test_ranks_over_a_limit(self, tmp_path: Path) -> None:
        folder = self.saved(tmp_path / "adapter", rank_pattern={r"layers\.1\..*": 5})
        assert load_adapter(small_decoder(), folder, max_rank=5).ranks
        with pytest.raises(AdapterError, match=r"rank 5 at model\.layers\.1\.self_attn\.q_proj; the limit is 4"):
            load_adapter(small_decoder(), folder, max_rank=4)

    def test_another_base_of_the_same_shapes(self, tmp_path: Path) -> None:
        folder = self.saved(tmp_path / "adapter")
        other = small_decoder()
        other.model.norm.weight.data[0] += 0.5
        before = other(IDS)
        with pytest.raises(CheckpointError, match="another base model of the same shapes"):
            load_adapter(other, folder)
        assert torch.equal(other(IDS), before)
        load_adapter(other, folder, check_base=False)

    def test_the_base_is_known_again_in_another_dtype_and_under_adapters(self, tmp_path: Path) -> None:
        folder = self.saved(tmp_path / "adapter")
        model = small_decoder()
        model.model.norm.weight.data = model.model.norm.weight.data.bfloat16().float()
        add_adapter(model, config(modules_to_save=["norm"], bias="all"), "under")
        remove_adapter(model, "under")
        add_adapter(model, config(modules_to_save=["norm"]), "under")
        load_adapter(model, folder)
        load_adapter(small_decoder().bfloat16(), folder)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_dtype_of_a_loaded_adapter(self, dtype: torch.dtype, tmp_path: Path) -> None:
        model = small_decoder()
        load_adapter(model, self.saved(tmp_path / "adapter", use_dora=True), dtype=dtype)
        assert {p.dtype for p in adapter_parameters(model)} == {dtype}
