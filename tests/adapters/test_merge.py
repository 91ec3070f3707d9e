"""Merging: the weights are what the definition says, the report is true, and unmerging gives back every byte."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import small_config, small_decoder, write_checkpoint
from torch import nn

from lorakit import (
    Linear4bit,
    LoraConfig,
    adapter_parameters,
    add_adapter,
    disable_adapters,
    load_model,
    merge_adapter,
    quantize,
    remove_adapter,
    set_adapter,
    unmerge_adapter,
)
from lorakit.adapters import adapter_configs, lora_layers
from lorakit.adapters.merge_report import share_of
from lorakit.errors import AdapterError, CheckpointError
from lorakit.layers import ResidualLinear4bit

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, 5, 99, 17, 3, 250]])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def mlp(four_bit: bool = False, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two linear layers, the first in 4 bits if asked for."""
    torch.manual_seed(0)
    first, second = nn.Linear(64, 48), nn.Linear(48, 32, bias=False)
    model = nn.Sequential(first, nn.ReLU(), second).to(dtype)
    if four_bit:
        model[0] = Linear4bit.from_linear(first)
    return model.requires_grad_(False)


def adapt(model: nn.Module, name: str = "default", size: float = 0.3, **settings: Any) -> None:
    """Attach a random adapter whose update of every layer has `size` times the norm of its weight."""
    torch.manual_seed(sum(map(ord, name)))
    add_adapter(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **settings), name)
    for layer in lora_layers(model, name).values():
        update = layer.scaling[name] * layer.lora_B[name].flatten(1) @ layer.lora_A[name].flatten(1)
        layer.lora_B[name].data *= size * layer.base_weight(torch.float32).norm() / update.norm()
        for magnitude in (p for key, p in layer.parameters_of(name).items() if "magnitude" in key):
            magnitude.data *= 1 + 0.1 * torch.randn_like(magnitude)


def full_snapshot(model: nn.Module) -> tuple[dict[str, int], dict[str, bytes], set[str], list[bool], list[set[str]]]:
    """All that a failed call, or a merge and its reversal, leaves as it was."""
    modules = {path: id(module) for path, module in model.named_modules(remove_duplicate=False)}
    tensors = dict(sorted((*model.named_parameters(), *model.named_buffers())))
    raw = {name: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}
    active = [set(layer.active) for layer in lora_layers(model).values()]
    return modules, raw, set(adapter_configs(model)), [t.requires_grad for t in tensors.values()], active


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model", small_decoder())


class TestWeights:
    @pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
    def test_a_merged_model_computes_what_the_adapted_one_did(self, dora: bool) -> None:
        model = mlp()
        adapt(model, use_dora=dora)
        expected = model(X)
        merge_adapter(model)
        assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
        torch.testing.assert_close(model(X), expected)
        assert not any(parameter.requires_grad for parameter in model.parameters())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
    def test_each_weight_is_rounded_once(self, dora: bool, dtype: torch.dtype) -> None:
        model = mlp(dtype=dtype)
        adapt(model, use_dora=dora)
        expected = {
            path: (layer.base_layer.weight.float() + layer.delta_weight("default").float()).to(dtype)
            for path, layer in lora_layers(model).items()
        }
        merge_adapter(model)
        for path, weight in expected.items():
            assert torch.equal(model.get_submodule(path).weight, weight)

    def test_an_inactive_adapter_is_merged_as_well(self) -> None:
        model = mlp()
        adapt(model)
        expected = model(X)
        set_adapter(model, [])
        merge_adapter(model)
        torch.testing.assert_close(model(X), expected)
        unmerge_adapter(model)
        assert torch.equal(model(X), mlp()(X))

    def test_what_stays_attached_is_added_to_the_merged_weights(self) -> None:
        model = mlp()
        adapt(model, "a")
        adapt(model, "b", target_modules=["2"])
        set_adapter(model, ["a", "b"])
        expected = model(X)
        merge_adapter(model, "a")
        assert list(adapter_configs(model)) == ["b"] and list(lora_layers(model)) == ["2"]
        torch.testing.assert_close(model(X), expected)
        with disable_adapters(model):
            assert not torch.allclose(model(X), expected)

    def test_the_order_of_several_makes_no_difference(self) -> None:
        weights = []
        for names in itertools.permutations("abc"):
            model = mlp(dtype=torch.bfloat16)
            adapt(model, "a")
            adapt(model, "b", use_dora=True)
            adapt(model, "c", target_modules=["2"])
            set_adapter(model, ["a", "b", "c"])
            merge_adapter(model, names)
            weights.append((model[0].weight, model[2].weight))
        assert all(torch.equal(one, first) for pair in weights for one, first in zip(pair, weights[0], strict=True))

    def test_one_after_the_other_is_all_at_once(self) -> None:
        models = [mlp(four_bit=True, dtype=torch.bfloat16) for _ in range(3)]
        for model in models:
            adapt(model, "a")
            adapt(model, "b", target_modules=["2"])
            adapt(model, "c")
        merge_adapter(models[0], ["a", "b", "c"])
        for name in ("c", "a", "b"):
            merge_adapter(models[1], name)
        merge_adapter(models[2], ["b", "c"], quantize=True)
        merge_adapter(models[2], "a")
        for model in models[1:]:
            assert torch.equal(model[0].weight, models[0][0].weight)
            assert torch.equal(model[2].weight, models[0][2].weight)

    def test_an_embedding_that_shares_the_weight_is_left_alone(self) -> None:
        model = small_decoder(tie_word_embeddings=True)
        before = model.model.embed_tokens.weight.clone()
        adapt(model, target_modules=["lm_head"])
        expected = model(IDS)
        report = merge_adapter(model)
        torch.testing.assert_close(model(IDS), expected)
        assert torch.equal(model.model.embed_tokens.weight, before)
        assert not model.config.tie_word_embeddings
        assert "lm_head shared its weight with model.embed_tokens" in str(report)
        unmerge_adapter(model)
        assert model.lm_head.base_layer.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


class TestFourBits:
    """The layer's weight is in 4 bits: what the base is, and what is stored."""

    def model(self, folder: Path, **settings: Any) -> nn.Module:
        model = load_model(folder, dtype=torch.float32, block_size=32)
        adapt(model, size=0.02, **settings)
        return model

    def test_onto_the_checkpoint_it_was_loaded_from(self, folder: Path) -> None:
        model, dense = self.model(folder), load_model(folder, quant_type=None, dtype=torch.float32)
        updates = {path: layer.delta_weight("default") for path, layer in lora_layers(model).items()}
        report = merge_adapter(model)
        assert report.base == folder and report.share == pytest.approx(1, abs=1e-5)
        for path, update in updates.items():
            layer = model.get_submodule(path)
            assert type(layer) is nn.Linear
            assert torch.equal(layer.weight, dense.get_submodule(path).weight + update)

    @pytest.mark.parametrize("given", [True, False], ids=["named", "remembered"])
    def test_onto_the_checkpoint_and_into_4_bits(self, folder: Path, given: bool) -> None:
        model, dense = self.model(folder), load_model(folder, quant_type=None, dtype=torch.float32)
        if given:
            model.folder = None
        updates = {path: layer.delta_weight("default") for path, layer in lora_layers(model).items()}
        report = merge_adapter(model, base=folder if given else None, quantize=True)
        for path, update in updates.items():
            layer, source = model.get_submodule(path), dense.get_submodule(path).weight
            assert type(layer) is Linear4bit and layer.block_size == 32
            wanted, alone = quantize(source + update, block_size=32), quantize(source, block_size=32)
            assert torch.equal(layer.packed, wanted.packed)
            real = wanted.dequantize(torch.float32) - alone.dequantize(torch.float32)
            (entry,) = (entry for entry in report.layers if entry.path == path)
            assert entry.share == pytest.approx(share_of(real, update), rel=1e-6)
            assert entry.max_error == pytest.approx(float((real - update).abs().max()), rel=1e-6)
            assert entry.bytes_before == entry.bytes_after == alone.nbytes
        assert report.share > 0.9

    def test_without_one_it_is_dequantized(self, folder: Path) -> None:
        model = self.model(folder)
        expected, logits = (
            {p: x.base_weight(torch.float32) + x.delta_weight("default") for p, x in lora_layers(model).items()},
            model(IDS),
        )
        report = merge_adapter(model, base=False)
        assert report.base is None
        for path, weight in expected.items():
            assert torch.equal(model.get_submodule(path).weight, weight)
        torch.testing.assert_close(model(IDS), logits)

    @pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("size", [0.01, 0.2])
    def test_without_one_in_4_bits_the_update_stays_beside_them(
        self, dora: bool, double_quant: bool, size: float
    ) -> None:
        model = mlp()
        model[0] = Linear4bit.from_linear(model[0], double_quant=double_quant)
        adapt(model, size=size, use_dora=dora)
        codes, expected = model[0].base_layer.packed.clone(), model(X)
        report = merge_adapter(model, quantize=True)
        assert isinstance(model[0], ResidualLinear4bit)
        assert torch.equal(model[0].packed, codes)
        rounded = dora and double_quant  # the gain goes into the scales, which are rounded to 8 bits
        assert report.share == pytest.approx(1, abs=1e-2 if rounded else 1e-6)
        torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-2 if rounded else 1e-5)

    def test_quantizing_again_alone_is_refused_where_it_loses_the_update(self) -> None:
        model = mlp(four_bit=True)
        adapt(model, size=0.01)
        before = full_snapshot(model)
        with pytest.raises(AdapterError, match=r"residual_rank=0 less than 0.95(.|\n)*0: 0\.0\d\d, needs rank 4"):
            merge_adapter(model, quantize=True, residual_rank=0)
        assert full_snapshot(model) == before

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_a_limited_rank_takes_the_nearer_way(self, rank: int) -> None:
        for size, spectrum in ((0.01, [1, 0.1, 0.05, 0.01]), (0.5, [1, 1, 1, 1])):
            model = mlp(four_bit=True)
            adapt(model)
            layer = lora_layers(model)["0"]
            u, v = (torch.linalg.qr(torch.randn(n, 4)).Q for n in (48, 64))
            layer.lora_B["default"].data = u * torch.tensor(spectrum) / layer.scaling["default"]
            layer.lora_A["default"].data = v.T.contiguous()
            layer.lora_B["default"].data *= (
                size * layer.base_weight(torch.float32).norm() / layer.delta_weight("default").norm()
            )
            update, base = layer.delta_weight("default").detach(), layer.base_weight(torch.float32)
            report = merge_adapter(model, quantize=True, residual_rank=rank)
            real = model[0].dense_weight(torch.float32) - base
            assert report.layers[0].share == pytest.approx(share_of(real, update), rel=1e-5)
            assert report.layers[0].residual_rank == rank
            assert ("codes kept" in report.layers[0].how) == (size == 0.01)
            best = float(
                torch.linalg.svdvals(update)[rank:].norm()
            )  # of all changes of that rank with the codes as they are (Eckart-Young)
            assert float((real - update).norm()) <= best * (1 + 1e-4) + 1e-6

    def test_a_merged_residual_layer_is_trained_through(self) -> None:
        model = mlp(four_bit=True)
        adapt(model)
        merge_adapter(model, quantize=True)
        dense = copy.deepcopy(mlp())
        dense[0].weight.data, dense[2].weight.data = model[0].dense_weight(torch.float32), model[2].weight.data
        for one in (model, dense):
            adapt(one, "next")
            x = X.clone().requires_grad_()
            one(x).square().sum().backward()
            one.x_grad = x.grad
        torch.testing.assert_close(model.x_grad, dense.x_grad)
        for ours, plain in zip(adapter_parameters(model), adapter_parameters(dense), strict=True):
            torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-3)


class TestWrongBases:
    def model(self, folder: Path) -> nn.Module:
        model = load_model(folder, dtype=torch.float32)
        adapt(model, size=0.02)
        return model

    def other(self, tmp_path: Path, change: float = 0.0, **settings: Any) -> Path:
        model = small_decoder(seed=int(not change), **settings)
        for parameter in model.parameters():
            parameter.data += change * parameter.std() * torch.randn_like(parameter) if change else 0
        return write_checkpoint(tmp_path / "other", model, small_config(**settings))

    @pytest.mark.parametrize(
        ("change", "settings", "message"),
        [
            (0.0, {}, r"q_proj.weight is not what the layer was quantized from: \d"),
            (0.05, {}, "is not what the layer was quantized from: 9"),
            (0.0, {"intermediate_size": 64}, r"gate_proj.weight has shape \(64, 32\), the layer has \(48, 32\)"),
            (0.0, {"num_hidden_layers": 1}, "is not in this checkpoint"),
        ],
        ids=["another", "a fine-tune of it", "another size", "fewer layers"],
    )
    def test_one_that_was_named(
        self, folder: Path, tmp_path: Path, change: float, settings: dict[str, int], message: str
    ) -> None:
        model = self.model(folder)
        before = full_snapshot(model)
        targets = (
            ["gate_proj"] if "intermediate_size" in settings else ["layers.1.mlp.up_proj"] if settings else ["q_proj"]
        )
        adapt(model, "b", target_modules=targets)
        remove_adapter(model, "default")
        before = full_snapshot(model)
        with pytest.raises(CheckpointError, match=message):
            merge_adapter(model, "b", base=self.other(tmp_path, change, **settings))
        assert full_snapshot(model) == before

    def test_one_that_was_only_remembered_is_not_used_and_the_report_says_so(
        self, folder: Path, tmp_path: Path
    ) -> None:
        model = self.model(folder)
        model.folder = self.other(tmp_path)
        report = merge_adapter(model)
        assert report.base is None and report.layers[0].how == "dequantized + update"
        assert "not merged onto the checkpoint that the model was loaded from" in str(report)

    def test_missing_ones(self, folder: Path, tmp_path: Path) -> None:
        model = self.model(folder)
        with pytest.raises(CheckpointError, match="nowhere"):
            merge_adapter(model, base=tmp_path / "nowhere")
        model.folder = tmp_path / "gone"
        assert merge_adapter(model).base is None

    def test_a_dense_model_that_is_not_the_checkpoints(self, folder: Path, tmp_path: Path) -> None:
        model = load_model(folder, quant_type=None, dtype=torch.float32)
        adapt(model)
        with pytest.raises(CheckpointError, match="holds other numbers"):
            merge_adapter(model, base=self.other(tmp_path))
        assert merge_adapter(model, base=folder).base == folder


class TestUnmerging:
    @given(data=st.data())
    def test_gives_back_every_byte_and_object(self, data: st.DataObject) -> None:
        dtype, four_bit = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
        model = mlp(four_bit, dtype)
        names = data.draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3, unique=True))
        for name in names:
            target = data.draw(st.sampled_from([["0"], ["2"], ["0", "2"]]))
            size = data.draw(st.sampled_from([1e-3, 0.1, 3.0]))
            adapt(model, name, size, target_modules=target, use_dora=data.draw(st.booleans()))
        set_adapter(model, data.draw(st.lists(st.sampled_from(names), unique=True)))
        before = full_snapshot(model)
        order = data.draw(st.permutations(names))
        count = data.draw(st.integers(1, len(order)))
        try:
            for name in order[:count]:
                merge_adapter(model, name, quantize=data.draw(st.booleans()))
        except AdapterError as error:
            assert "scales the rows" in str(error)
        if hasattr(model, "lora_merged"):
            model.train(data.draw(st.booleans()))(X.to(dtype))
            unmerge_adapter(model)
        assert full_snapshot(model) == before

    def test_training_goes_on_with_the_same_parameters(self) -> None:
        model = mlp()
        adapt(model)
        parameters = adapter_parameters(model)
        merge_adapter(model)
        assert adapter_parameters(model) == []
        unmerge_adapter(model)
        assert all(a is b for a, b in zip(adapter_parameters(model), parameters, strict=True))
        model(X).sum().backward()
        assert all(parameter.grad is not None for parameter in parameters)

    def test_an_adapter_that_came_since_stays(self) -> None:
        model = mlp(four_bit=True)
        adapt(model, "a")
        merge_adapter(model, "a")
        adapt(model, "b")
        set_adapter(model, "b")
        unmerge_adapter(model)
        reference = mlp(four_bit=True)
        adapt(reference, "a")
        for path, layer in lora_layers(model).items():
            assert set(layer.lora_A) == {"a", "b"}
            plain = lora_layers(reference)[path]
            assert torch.equal(layer.base_weight(torch.float32), plain.base_weight(torch.float32))
        set_adapter(model, "a")
        assert torch.equal(model(X), reference(X))

    def test_a_model_that_was_converted_since(self) -> None:
        model = mlp(four_bit=True)
        adapt(model)
        codes = model[0].base_layer.packed.clone()
        merge_adapter(model)
        model.bfloat16()
        unmerge_adapter(model)
        assert model[2].base_layer.weight.dtype == torch.bfloat16
        assert torch.equal(model[0].base_layer.packed, codes)
        assert model(X.bfloat16()).dtype == torch.bfloat16

    def test_a_copy_has_its_own_originals(self) -> None:
        model = mlp()
        adapt(model)
        before = model(X)
        merge_adapter(model)
        twin = copy.deepcopy(model)
        unmerge_adapter(twin)
        assert torch.equal(twin(X), before) and not lora_layers(model)
        unmerge_adapter(model)
        assert torch.equal(model(X), before)

    def test_not_reversible(self) -> None:
        model = mlp()
        adapt(model, "a")
        expected = model(X)
        merge_adapter(model, "a", reversible=False)
        with pytest.raises(AdapterError, match="nothing is merged"):
            unmerge_adapter(model)
        adapt(model, "b")
        merge_adapter(model, "b")
        unmerge_adapter(model)
        set_adapter(model, [])
        torch.testing.assert_close(model(X), expected)


class TestRefusals:
    def refused(self, model: nn.Module, call: Callable[[nn.Module], object]) -> str:
        before = full_snapshot(model)
        with pytest.raises(AdapterError) as caught:
            call(model)
        assert full_snapshot(model) == before
        return str(caught.value)

    def test_unknown_ones_with_the_nearest(self) -> None:
        model = mlp()
        adapt(model, "french")
        message = self.refused(model, lambda m: merge_adapter(m, "frensh"))
        assert "no adapter 'frensh'; did you mean 'french'" in message
        assert "nothing to merge" in self.refused(model, lambda m: merge_adapter(m, []))
        assert "nothing is merged" in self.refused(model, unmerge_adapter)

    def test_merging_twice(self) -> None:
        model = mlp()
        adapt(model)
        merge_adapter(model)
        assert "'default' is merged already" in self.refused(model, merge_adapter)

    def test_a_name_that_was_given_to_another_since(self) -> None:
        model = mlp()
        adapt(model)
        merge_adapter(model)
        adapt(model)
        for call in (unmerge_adapter, merge_adapter):
            assert "new adapter of the name of a merged one, 'default'" in self.refused(model, call)
        remove_adapter(model)
        unmerge_adapter(model)

    def test_a_layer_that_was_replaced_since(self) -> None:
        model = mlp()
        adapt(model)
        merge_adapter(model)
        model[2] = nn.Linear(48, 32)
        assert "2 is no longer the layer that was merged" in self.refused(model, unmerge_adapter)

    @pytest.mark.parametrize("four_bit", [False, True])
    def test_overflow(self, four_bit: bool) -> None:
        model = mlp(four_bit, torch.float16)
        adapt(model, "a")
        adapt(model, "b")
        merge_adapter(model, "a")
        lora_layers(model)["2"].lora_B["b"].data *= 1e9
        before = full_snapshot(model)
        with pytest.raises(AdapterError, match="2: the merged weight would hold inf or nan in float16"):
            merge_adapter(model, "b")
        assert full_snapshot(model) == before  # "a" is merged as it was
        unmerge_adapter(model)
        assert list(lora_layers(model)["0"].lora_A) == ["b", "a"]

    def test_one_that_would_change_another_adapters_meaning(self) -> None:
        model = mlp()
        adapt(model, "a")
        adapt(model, "rows", use_dora=True)
        assert "'rows' scales the rows" in self.refused(model, lambda m: merge_adapter(m, "a"))
        merge_adapter(model, ["a", "rows"])

    def test_a_residual_of_a_merge_for_good(self) -> None:
        model = mlp(four_bit=True)
        adapt(model)
        merge_adapter(model, quantize=True, reversible=False)
        adapt(model, "b")
        expected = model(X)
        assert "quantize=False only" in self.refused(model, lambda m: merge_adapter(m, "b", quantize=True))
        merge_adapter(model, "b")
        torch.testing.assert_close(model(X), expected)


class TestReport:
    def test_it_is_a_readable_table(self) -> None:
        model = mlp(four_bit=True)
        adapt(model, size=0.25)
        text = str(merge_adapter(model))
        assert text.startswith("merged 'default' into 2 layers, onto the model's own weights: 1.0000 of the update")
        first, second = text.splitlines()[-2:]
        assert first.split()[:4] == ["0", "dequantized", "+", "update"] and "25.00%" in first and "6,144" in second
        assert len({line.index("  ", 30) for line in (first, second)}) == 1

    def test_the_worst_of_many_layers_are_shown(self) -> None:
        model = small_decoder(num_hidden_layers=4)
        adapt(model)
        report = merge_adapter(model)
        assert len(report.layers) == 28 and "the 20 layers of which least survived" in str(report)
        assert len(report.table().splitlines()) == 29

    def test_a_warning_where_much_is_lost(self) -> None:
        model = mlp(dtype=torch.bfloat16)
        adapt(model, size=1e-4)  # less than bf16 can add
        for layer in lora_layers(model).values():
            layer.lora_A["default"].data = layer.lora_A["default"].data.sign() * 1e-4
            layer.lora_B["default"].data = layer.lora_B["default"].data.sign() * 1e-4
        with pytest.warns(UserWarning, match=r"in 2 of 2 layers less than 0.95 of the update survived"):
            report = merge_adapter(model)
        assert report.share < 0.95 and str(report).count("warning: ") == 2

    def test_an_untrained_adapter(self) -> None:
        model = mlp()
        add_adapter(model, LoraConfig(r=2))
        report = merge_adapter(model)
        assert report.share == 1 and not report.warnings and report.layers[0].norm == 0


def test_no_parameter_is_left_behind_in_the_state() -> None:
    model = mlp()
    names = list(model.state_dict())
    adapt(model)
    merge_adapter(model)
    assert list(model.state_dict()) == names


def test_inference_mode_leaves_ordinary_tensors() -> None:
    model = mlp()
    adapt(model)
    with torch.inference_mode():
        merge_adapter(model)
    adapt(model, "b")
    model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(model))
