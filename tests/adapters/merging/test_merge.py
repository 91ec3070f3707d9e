"""Merging: the weights are what the definition says, the report is true, and unmerging gives back every byte."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from made import DTYPES, IDS, X, adapt, full_snapshot, mlp, small_config, small_decoder, write_checkpoint
from tolerances import SMALL_DECODER, assert_alike, assert_within, factored, rounding
from torch import nn

from lorakit import (
    Linear4bit,
    adapter_parameters,
    disable_adapters,
    load_model,
    merge_adapter,
    quantize,
    set_adapter,
    unmerge_adapter,
)
from lorakit.adapters import adapter_configs, lora_layers
from lorakit.adapters.merging.report import share_of
from lorakit.errors import AdapterError, CheckpointError
from lorakit.layers import ResidualLinear4bit

# Roundings through `mlp` and back: sums over 64 inputs, 4 ranks, 48 hidden and 4 ranks, then 5 rows, and as much again;
# the merged weights have three more, DoRA's norm as many as it has inputs.
TERMS = 2 * (64 + 4 + 48 + 4) + 5 + 2 * 3


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
        assert_alike(model(X), expected, TERMS)
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
        assert_alike(model(X), expected, TERMS)
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
        assert_alike(model(X), expected, TERMS)
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
        assert_alike(model(IDS), expected, SMALL_DECODER)
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
        updates = {path: layer.delta_weight("default").detach() for path, layer in lora_layers(model).items()}
        report = merge_adapter(model)
        assert report.base == folder
        for layer in report.layers:  # a change of the weight is off by a rounding of the weight, 1 / relative of it
            assert_within(layer.share, 1.0, 2 * rounding(2, 1 + 1 / layer.relative))
        for path, update in updates.items():
            layer = model.get_submodule(path)
            assert type(layer) is nn.Linear
            assert torch.equal(layer.weight, dense.get_submodule(path).weight + update)

    def test_dora_scales_the_rows_of_the_weight_that_it_is_merged_onto(self, folder: Path) -> None:
        four_bit = self.model(folder, use_dora=True)
        dense = load_model(folder, quant_type=None, dtype=torch.float32)
        adapt(dense, use_dora=True)
        for ours, theirs in zip(adapter_parameters(dense), adapter_parameters(four_bit), strict=True):
            ours.data = theirs.data
        assert merge_adapter(four_bit).base == folder
        merge_adapter(dense)
        for path, weight in dense.named_parameters():
            # Two gains, each with the norm over at most 48 inputs, of which a root takes half, and five more roundings.
            assert_within(four_bit.get_parameter(path), weight, 2 * rounding(48 // 2 + 5, weight.abs()))

    @pytest.mark.filterwarnings("ignore:in 7 of 14 layers")  # of so few weights that the tipping codes do not average
    @pytest.mark.parametrize("given", [True, False], ids=["named", "remembered"])
    def test_onto_the_checkpoint_and_into_4_bits(self, folder: Path, given: bool) -> None:
        model, dense = self.model(folder), load_model(folder, quant_type=None, dtype=torch.float32)
        if given:
            model.folder = None
        updates = {path: layer.delta_weight("default").detach() for path, layer in lora_layers(model).items()}
        report = merge_adapter(model, base=folder if given else None, quantize=True)
        for path, update in updates.items():
            layer, source = model.get_submodule(path), dense.get_submodule(path).weight
            assert type(layer) is Linear4bit and layer.block_size == 32
            wanted, alone = quantize(source + update, block_size=32), quantize(source, block_size=32)
            assert torch.equal(layer.packed, wanted.packed)
            real = wanted.dequantize(torch.float32) - alone.dequantize(torch.float32)
            (entry,) = (entry for entry in report.layers if entry.path == path)
            assert entry.share == share_of(real, update)
            assert entry.max_error == float((real - update).abs().max())
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
        assert_alike(model(IDS), logits, SMALL_DECODER)

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
        if rounded:
            assert report.share == pytest.approx(1, abs=1e-2)
            assert (model(X) - expected).abs().max() < 1e-2
        else:
            assert_within(report.share, 1.0, 2 * rounding(4 + 4, 1 + 1 / report.layers[0].relative))
            assert_alike(model(X), expected, TERMS)

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
            # Computed from the codes and the residual apart, and here from the layer's weight.
            off = rounding(rank + 4, base.abs().max()) * update.numel() ** 0.5 / update.norm()
            assert_within(report.layers[0].share, share_of(real, update), 2 * off)
            assert report.layers[0].residual_rank == rank
            assert ("codes kept" in report.layers[0].how) == (size == 0.01)
            best = float(
                torch.linalg.svdvals(update)[rank:].norm()
            )  # of all changes of that rank with the codes as they are (Eckart-Young)
            off = rounding(factored(*update.shape), update.norm()) + rounding(rank + 4, base.norm())
            assert float((real - update).norm()) <= best + off

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
        assert_alike(model.x_grad, dense.x_grad, TERMS)
        for ours, plain in zip(adapter_parameters(model), adapter_parameters(dense), strict=True):
            assert_alike(ours.grad, plain.grad, TERMS)


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
            (0.01, {}, r"is not what the layer was quantized from: 9[4567]\.\d% of the codes agree"),
            (0.0, {"intermediate_size": 64}, r"gate_proj.weight has shape \(64, 32\), the layer has \(48, 32\)"),
            (0.0, {"num_hidden_layers": 1}, "is not in this checkpoint"),
        ],
        ids=["another", "a fine-tune of it", "another size", "fewer layers"],
    )
    def test_one_that_was_named(
        self, folder: Path, tmp_path: Path, change: float, settings: dict[str, int], message: str
    ) -> None:
        model = load_model(folder, dtype=torch.float32)
        size_matters = ["gate_proj"] if "intermediate_size" in settings else ["layers.1.mlp.up_proj"]
        adapt(model, "b", target_modules=size_matters if settings else ["q_proj"])
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
