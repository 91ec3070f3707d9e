"""Weights that several modules share, and adapters that train one of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from made import small_decoder
from safetensors.torch import load_file, save_file
from tolerances import SMALL_DECODER, assert_alike
from torch import Tensor, nn

from lorakit import (
    LoraConfig,
    add_adapter,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from lorakit.adapters import adapter_modules, adapter_parameters
from lorakit.errors import AdapterError, CheckpointError
from lorakit.layers import SavedModule, TiedModule, TrainedTokens

IDS = torch.tensor([[1, 2, 3, 4, 1], [7, 8, 9, 2, 2]])
STATS = 64  # roundings through a small net of two layers of eight


class Side(nn.Module):
    """An encoder or a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.proj = nn.Embedding(10, 8), nn.Linear(8, 8)


class Pair(nn.Module):
    """An encoder and a decoder with tables of their own modules but one weight, and a head with the same weight."""

    def __init__(self, hears_of_main: bool = True) -> None:
        super().__init__()
        self.shared = nn.Embedding(10, 8)
        self.encoder, self.decoder = Side(), Side()
        self.lm_head = nn.Linear(8, 10, bias=False)
        for module in (self.encoder.embed_tokens, self.decoder.embed_tokens, self.lm_head):
            module.weight = self.shared.weight
        if hears_of_main:
            self.get_input_embeddings = lambda: self.shared

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encoder.proj(self.encoder.embed_tokens(ids)) + self.decoder.embed_tokens(ids.flip(-1))
        y: Tensor = self.lm_head(self.decoder.proj(x).tanh())
        return y


def pair(**arguments: Any) -> Pair:
    torch.manual_seed(0)
    return Pair(**arguments).eval()


def config(**values: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["proj"], "init_lora_weights": False} | values)


@torch.no_grad()
def shake(model: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in adapter_parameters(model):
        parameter.add_(torch.randn_like(parameter) / 5)


def dense_twin(model: nn.Module, weight: Tensor) -> Pair:
    """Return the pair with the low-rank updates of `model` merged, and this weight wherever the table is."""
    twin = copy.deepcopy(model)
    merge_adapter(twin)
    plain = pair()
    plain.load_state_dict(twin.state_dict(), strict=False)
    plain.shared.weight.data.copy_(weight)
    return plain


TRAINED = {
    "rows": {"trainable_token_indices": [3, 4]},
    "rows of a named table": {"trainable_token_indices": {"decoder.embed_tokens": [3, 4]}},
    "rows of two tables": {"trainable_token_indices": {"embed_tokens": [3, 4]}},
    "the table": {"modules_to_save": ["shared"], "ensure_weight_tying": True},
    "the head": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "both": {"modules_to_save": ["lm_head", "shared"], "ensure_weight_tying": True},
    "two tables": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("values", TRAINED.values(), ids=TRAINED)
def test_all_who_share_a_table_follow(values: dict[str, Any], tmp_path: Path) -> None:
    model = pair()
    modules = {path: id(module) for path, module in model.named_modules(remove_duplicate=False)}
    before, state = model(IDS), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    add_adapter(model, config(**values))
    assert torch.equal(model(IDS), model(IDS))
    shake(model)
    sources = [m for m in adapter_modules(model).values() if isinstance(m, TrainedTokens | SavedModule)]
    followers = [m for m in adapter_modules(model).values() if isinstance(m, TiedModule)]
    assert [source.base_layer.weight is model.shared.base_layer.weight for source in sources] == [True]
    assert len(followers) == 3
    table = sources[0].weight.detach()
    expected = model(IDS)
    assert_alike(expected, dense_twin(model, table)(IDS), STATS)
    (parameter,) = sources[0].parameters_of("default").values()
    expected.sum().backward()
    assert parameter.grad is not None and parameter.grad.any()

    folder, other = save_adapter(model, tmp_path / "adapter"), pair()
    load_adapter(other, folder)
    assert_alike(other(IDS), expected, STATS)

    merge_adapter(model)
    assert_alike(model(IDS), expected, STATS)
    tables = {id(m.weight) for m in (model.shared, model.encoder.embed_tokens, model.lm_head)}
    assert len(tables) == 1
    unmerge_adapter(model)
    assert torch.equal(model(IDS), expected)
    remove_adapter(model)
    assert {path: id(module) for path, module in model.named_modules(remove_duplicate=False)} == modules
    assert torch.equal(model(IDS), before)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


class TestFiles:
    def folder(self, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
        model = pair()
        add_adapter(model, config(modules_to_save=["shared"], ensure_weight_tying=True))
        shake(model)
        folder = save_adapter(model, tmp_path / "adapter")
        return folder, load_file(folder / "adapter_model.safetensors")

    def test_a_copy_is_there_under_the_name_of_each(self, tmp_path: Path) -> None:
        _, tensors = self.folder(tmp_path)
        tables = [tensors[f"base_model.model.{path}.weight"] for path in
                  ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")]  # fmt: skip
        assert all(torch.equal(table, tables[0]) for table in tables)

    def test_the_further_names_may_lack(self, tmp_path: Path) -> None:
        folder, tensors = self.folder(tmp_path)
        del tensors["base_model.model.lm_head.weight"]
        save_file(tensors, folder / "adapter_model.safetensors")
        load_adapter(pair(), folder)

    def test_two_values_of_one_parameter_are_refused(self, tmp_path: Path) -> None:
        folder, tensors = self.folder(tmp_path)
        tensors["base_model.model.lm_head.weight"] += 1
        save_file(tensors, folder / "adapter_model.safetensors")
        model = pair()
        before = model(IDS)
        with pytest.raises(
            CheckpointError, match=r"lm_head.weight differs from base_model.model.shared.weight, and the"
        ):
            load_adapter(model, folder)
        assert torch.equal(model(IDS), before) and not adapter_modules(model)

    def test_a_name_that_matches_nothing_here_may_stand_in_a_file(self, tmp_path: Path) -> None:
        """PEFT writes both the name that it was given and the path of the input embedding."""
        folder, _ = self.folder(tmp_path)
        file = folder / "adapter_config.json"
        file.write_text(file.read_text(encoding="utf-8").replace('"shared"', '"wte", "shared"'), encoding="utf-8")
        load_adapter(pair(), folder)


class TestSaidOrRefused:
    def test_a_copy_of_a_table_has_to_be_said(self) -> None:
        with pytest.raises(
            AdapterError, match=r"shares its weight with encoder.embed_tokens, decoder.embed_tokens, lm_"
        ):
            add_adapter(pair(), config(modules_to_save=["shared"]))

    @pytest.mark.parametrize("names", [["lm_head"], ["lm_head", "shared", "embed_tokens"]])
    def test_a_copy_of_its_own_is_warned_about(self, names: list[str]) -> None:
        model = pair()
        with pytest.warns(UserWarning, match=r"shares its weight with .* the copy is not tied to them"):
            add_adapter(model, config(modules_to_save=names))
        shake(model)
        assert model.lm_head.weight is not model.shared.weight

    def test_two_who_share_and_train_more_cannot_both_be_named(self) -> None:
        model = pair()
        model.lm_head.bias = nn.Parameter(torch.zeros(10))
        with pytest.raises(AdapterError, match="names shared and lm_head, which share a weight; name one"):
            add_adapter(model, config(modules_to_save=["shared", "lm_head"], ensure_weight_tying=True))
        assert not adapter_modules(model)

    def test_other_tokens_of_one_table(self) -> None:
        tokens = {"encoder.embed_tokens": [1], "decoder.embed_tokens": [2]}
        with pytest.raises(AdapterError, match="share a weight, and trainable_token_indices names other tokens"):
            add_adapter(pair(), config(trainable_token_indices=tokens))
        model = pair()
        add_adapter(model, config(trainable_token_indices=tokens, ensure_weight_tying=False))
        rows = [path for path, module in adapter_modules(model).items() if isinstance(module, TrainedTokens)]
        assert rows == ["encoder.embed_tokens", "decoder.embed_tokens"]
        assert not any(isinstance(module, TiedModule) for module in adapter_modules(model).values())

    def test_a_low_rank_update_is_not_tied(self) -> None:
        with pytest.raises(AdapterError, match=r"lm_head shares its weight with shared, .* changes lm_head alone"):
            add_adapter(pair(), config(target_modules=["lm_head"], ensure_weight_tying=True))
        with pytest.warns(
            UserWarning, match=r"shared shares its table with encoder.embed_tokens, decoder.embed_tokens"
        ):
            add_adapter(pair(), config(target_modules=["shared"]))

    def test_rows_and_a_layer_of_one_table(self) -> None:
        with pytest.raises(
            AdapterError, match=r"lm_head shares its weight with shared and follows .* a LoRALinear as well"
        ):
            add_adapter(pair(), config(target_modules=["proj", "lm_head"], trainable_token_indices=[1]))

    def test_a_part_of_a_module_that_another_adapter_trains(self) -> None:
        model = pair()
        add_adapter(model, config(modules_to_save=["decoder"], ensure_weight_tying=False), "a")
        with pytest.raises(AdapterError, match=r"decoder.embed_tokens, a part of decoder, which cannot follow it"):
            add_adapter(model, config(trainable_token_indices=[1], target_modules=[]), "b")
        other = pair()
        add_adapter(other, config(), "a")
        with pytest.raises(AdapterError, match=r"decoder of modules_to_save holds decoder.proj, which another adapter"):
            add_adapter(other, config(target_modules=[], modules_to_save=["decoder"], ensure_weight_tying=False), "b")

    def test_none_is_not_a_shared_weight(self) -> None:
        """A parametrized layer has no weight among its parameters, and neither has a container."""
        norm = nn.utils.parametrizations.weight_norm
        model = nn.ModuleDict(
            {"proj": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4)), "x": norm(nn.Linear(4, 4))}
        )
        add_adapter(model, config(modules_to_save=["head"], bias="all"))

    def test_a_layer_that_computes_its_weight_is_not_merged(self) -> None:
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
        add_adapter(model, config(target_modules=["0"]))
        x = torch.randn(2, 4)
        before = model(x)
        with pytest.raises(AdapterError, match="0 is a ParametrizedLinear that computes its weight from other"):
            merge_adapter(model)
        assert torch.equal(model(x), before)

    def test_a_merge_does_not_part_what_another_adapter_follows(self) -> None:
        model = pair()
        add_adapter(model, config(target_modules=["lm_head"]), "head")
        add_adapter(model, config(target_modules=[], trainable_token_indices=[1]), "rows")
        add_adapter(model, config(target_modules=[], trainable_token_indices=[2]), "more")
        shake(model)
        set_adapter(model, "rows")
        before = model(IDS)
        with pytest.raises(
            AdapterError, match="lm_head follows a weight that the adapter 'rows' trains, and the merge"
        ):
            merge_adapter(model, "head")
        assert torch.equal(model(IDS), before)
        merge_adapter(model, "rows")  # both rows are those of one table
        assert_alike(model(IDS), before, STATS)
        set_adapter(model, "more")
        both = model(IDS)
        unmerge_adapter(model)
        set_adapter(model, ["rows", "more"])
        assert_alike(model(IDS), both, STATS)

    def test_rows_of_a_table_that_is_computed(self) -> None:
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Embedding(5, 4)), nn.Linear(4, 4))
        add_adapter(model, config(target_modules=["1"], trainable_token_indices={"0": [1]}))
        with pytest.raises(AdapterError, match="0 is a ParametrizedEmbedding that computes its weight"):
            merge_adapter(model)


class TwoBiases(nn.Module):
    """As BERT's head: the bias belongs to a module and to the layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.bias = nn.Linear(4, 4), nn.Parameter(torch.randn(4))
        self.decoder = nn.Linear(4, 4)
        self.decoder.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.proj(x)) + self.bias.sin()


@pytest.mark.parametrize("values", [{"bias": "all"}, {"modules_to_save": ["head"], "target_modules": ["body"]}])
def test_a_bias_that_is_shared_within_a_module_is_one_bias(values: dict[str, Any], tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential()

    model, other = (make() for _ in "ab")
    for each in (model, other):
        torch.manual_seed(0)
        each.add_module("body", nn.Linear(4, 4))
        each.add_module("head", TwoBiases())
    x, bias = torch.randn(3, 4), model.head.bias
    add_adapter(model, config(**values))
    shake(model)
    expected = model(x)
    expected.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter_parameters(model))
    folder = save_adapter(model, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.head.bias"], tensors["base_model.model.head.decoder.bias"])
    load_adapter(other, folder)
    assert_alike(other(x), expected, STATS)
    merge_adapter(model)
    assert_alike(model(x), expected, STATS)
    assert model.head.bias is model.head.decoder.bias is not bias
    unmerge_adapter(model)
    assert torch.equal(model(x), expected)
    remove_adapter(model)
    assert model.head.bias is model.head.decoder.bias is bias


def test_a_tied_decoder_trains_the_table_whatever_is_named() -> None:
    model = small_decoder(tie_word_embeddings=True)
    add_adapter(
        model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    )
    shake(model)
    kinds = {path: type(module) for path, module in adapter_modules(model).items() if "proj" not in path}
    assert kinds == {"model.embed_tokens": SavedModule, "lm_head": TiedModule}
    assert_alike(model(IDS), model.hidden_states(IDS) @ model.model.embed_tokens.weight.T, SMALL_DECODER)
