"""The quantization view: every figure against its dense definition, and planted answers: rows, outliers, repair."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import small_config, small_decoder, write_checkpoint
from tolerances import THROUGH_CHOLESKY, factored, rounding
from torch import Tensor, nn

from lorakit import Decoder, LoraConfig, add_adapter, load_model, quantize
from lorakit.adapters import lora_layers
from lorakit.adapters.low_rank import LowRank
from lorakit.errors import AdapterError, CheckpointError
from lorakit.inspection.quantization.code_use import expected_shares
from lorakit.inspection.quantization.quantization_view import measure_quantization, quantization_view

# Relative, in float64: of the decompositions of updates and of errors, whose matrices are 40 x 130 at most.
EXACT = float(THROUGH_CHOLESKY * rounding(factored(40, 130), 1.0, torch.float64))
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def source_and_error(rows: int = 24, columns: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return source, quantize(source).dequantize(torch.float32).double() - source.double()


def low_rank(rows: int, columns: int, rank: int, seed: int = 1) -> LowRank:
    random = torch.Generator().manual_seed(seed)
    up = torch.randn(rows, rank, generator=random, dtype=torch.float64)
    return LowRank(0.01 * up, torch.randn(rank, columns, generator=random, dtype=torch.float64))


class TestFigures:
    @given(rows=st.integers(2, 40), columns=st.integers(2, 130), rank=st.integers(1, 6), seed=st.integers(0, 1000),
           quant_type=st.sampled_from(["nf4", "fp4"]), block_size=st.sampled_from([32, 64]))  # fmt: skip
    @settings(max_examples=40, deadline=None)
    def test_are_the_dense_ones(
        self, rows: int, columns: int, rank: int, seed: int, quant_type: str, block_size: int
    ) -> None:
        source = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        weight, update = quantize(source, quant_type, block_size), low_rank(rows, columns, rank, seed)
        found = measure_quantization("x", weight, source, update, top=3)
        error = weight.dequantize(torch.float32).double() - source.double()
        d, s = update.dense(), torch.linalg.svdvals(error)
        norm = float(error.norm())
        assert found.spectrum_error == 0
        assert found.singular_values == pytest.approx(s.tolist(), rel=EXACT, abs=EXACT * float(s[0]))
        assert found.error.snr_db == pytest.approx(20 * math.log10(float(source.double().norm()) / norm), rel=EXACT)
        assert found.repair is not None
        assert found.repair.cosine == pytest.approx(float((d * -error).sum() / (d.norm() * norm)), rel=EXACT, abs=EXACT)
        repaired = 1 - float((error + d).norm() ** 2) / norm**2
        assert found.repair.repaired == pytest.approx(repaired, rel=EXACT, abs=EXACT)
        repairable = float(s[: min(rank, len(s))].square().sum()) / norm**2
        assert found.repair.repairable == pytest.approx(repairable, rel=EXACT)
        relative = error.norm(dim=1) / source.double().norm(dim=1)
        assert [row.relative_error for row in found.worst_rows] == pytest.approx(
            relative.topk(min(3, rows)).values.tolist(), rel=EXACT
        )
        assert found.worst_rows[0].start == (found.worst_rows[0].index, 0)
        assert found.worst_rows[0].index == found.error.worst_row
        for block in found.worst_blocks:
            begin = block.index * block_size
            assert block.start == (begin // columns, begin % columns)
            e, w = (t.double().flatten()[begin : begin + block_size] for t in (error, source))
            assert block.relative_error == pytest.approx(float(e.norm() / w.norm()), rel=EXACT)
            assert block.share == pytest.approx(float(e.norm() ** 2) / norm**2, rel=EXACT)
        shares = weight.codes.flatten().long().bincount(minlength=16).double() / (rows * columns)
        assert {use.code: use.share for use in found.codes} == dict(enumerate(shares.tolist()))
        assert [use.value for use in found.codes] == sorted(weight.code_values.tolist())
        entropy = float(-(shares[shares > 0].log2() * shares[shares > 0]).sum())
        assert found.code_entropy == pytest.approx(entropy, rel=EXACT)

    def test_of_a_large_layer_keep_their_bound(self) -> None:
        """More than 1,024 rows and columns: leading singular values, none above its own, each near a true one."""
        source = torch.randn(1100, 1060, generator=torch.Generator().manual_seed(0))
        source[:, :3] *= 20  # columns that stand out, so that the error has directions that do
        found = measure_quantization("x", quantize(source), source)
        error = quantize(source).dequantize(torch.float32).double() - source.double()
        true = torch.linalg.eigvalsh(error.T @ error).flip(0).clamp(min=0).sqrt()
        values = torch.tensor(found.singular_values, dtype=torch.float64)
        assert len(values) == 64 and 0 < found.spectrum_error < 0.1 * float(true[0])
        assert bool((values <= true[:64] * (1 + EXACT)).all())
        assert float((values[:, None] - true).abs().min(1).values.max()) <= found.spectrum_error

    @pytest.mark.parametrize(("quant_type", "block_size"), [("nf4", 64), ("nf4", 32), ("fp4", 64)])
    def test_the_expected_use_of_codes_is_that_of_normal_weights(self, quant_type: str, block_size: int) -> None:
        expected = expected_shares(quant_type, block_size)
        assert sum(expected) == pytest.approx(1.0, abs=1e-7)
        source = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))
        counts = quantize(source, quant_type, block_size).codes.flatten().long().bincount(minlength=16)
        assert expected == pytest.approx((counts / source.numel()).tolist(), abs=1e-3)  # five deviations of 2^21 draws

    def test_normal_weights_are_near_it_and_others_are_not(self) -> None:
        random = torch.Generator().manual_seed(0)
        normal = torch.randn(256, 256, generator=random)
        near = measure_quantization("x", quantize(normal), normal)
        far = measure_quantization("x", quantize(normal.sign()), normal.sign())
        assert near.code_distance < 0.01 and 3.8 < near.code_entropy < 4
        assert far.code_distance > 0.8 and far.code_entropy == pytest.approx(1.0, abs=0.01)
        assert far.error.snr_db == math.inf and far.repair is None and far.worst_rows[0].relative_error == 0


class TestPlanted:
    def test_an_adapter_that_is_the_quantization_error_is_recognised(self) -> None:
        source, error = source_and_error()
        u, s, vh = torch.linalg.svd(error, full_matrices=False)
        repair = measure_quantization("x", quantize(source), source, LowRank(-u[:, :4] * s[:4], vh[:4])).repair
        assert repair is not None and repair.verdict == "repairs"
        assert repair.alignment == pytest.approx(1.0, rel=EXACT)
        assert repair.repaired == pytest.approx(repair.repairable, rel=EXACT)
        all_of_it = measure_quantization("x", quantize(source), source, LowRank(-u * s, vh)).repair
        assert all_of_it is not None and all_of_it.repaired == pytest.approx(1.0, rel=EXACT)
        worse = measure_quantization("x", quantize(source), source, LowRank(u[:, :4] * s[:4], vh[:4])).repair
        assert worse is not None and worse.verdict == "learns the task" and worse.repaired < 0

    def test_an_adapter_of_anything_else_learns_the_task(self) -> None:
        source, _ = source_and_error()
        repair = measure_quantization("x", quantize(source), source, low_rank(24, 96, 4)).repair
        assert repair is not None and repair.verdict == "learns the task"

    def test_half_and_half_repairs_in_part(self) -> None:
        source, error = source_and_error(64, 128)
        u, s, vh = torch.linalg.svd(error, full_matrices=False)
        other = low_rank(64, 128, 4)
        mixed = LowRank(-u[:, :4] * s[:4], vh[:4]) + other.scaled(3 * float(s[:4].norm()) / float(other.norm()))
        repair = measure_quantization("x", quantize(source), source, mixed).repair
        assert repair is not None and repair.verdict == "partly repairs"

    def test_the_row_the_block_and_the_outliers(self) -> None:
        source = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)) * 0.02
        source[5, 70] = 3.0
        found = measure_quantization("x", quantize(source), source, top=2)
        assert found.outliers.count == found.outliers.blocks == 1
        assert found.outliers.largest == ((5, 70, 3.0),)
        assert found.outliers.error_share > 0.05
        blocks = measure_quantization("x", quantize(source, double_quant=False), source)
        assert blocks.outliers.error_share == max(
            part.share
            for part in measure_quantization("x", quantize(source, double_quant=False), source, top=64).worst_blocks
        )


class TestOfAModel:
    @pytest.fixture(scope="class")
    @staticmethod
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write_checkpoint(tmp_path_factory.mktemp("model"), small_decoder(**WIDE), small_config(**WIDE))

    def four_bit(self, folder: Path) -> Decoder:
        model = load_model(folder, dtype=torch.float32)
        torch.manual_seed(0)
        add_adapter(model, LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        return model

    def test_every_4_bit_layer_against_its_source(self, folder: Path) -> None:
        model = self.four_bit(folder)
        view = quantization_view(model)
        assert len(view.layers) == 14 and sum(layer.repair is not None for layer in view.layers) == 4
        source = load_model(folder, quant_type=None, dtype=torch.float32)
        for layer in view.layers:
            dense = source.get_submodule(layer.name).weight
            module = model.get_submodule(layer.name)
            base = module.base_layer if layer.repair else module
            assert layer.error == base.quantized.error(dense)
        assert view == quantization_view(model, source=source) == quantization_view(model, source=folder)
        chosen = quantization_view(model, layers=[Q])
        assert [layer.name for layer in chosen.layers] == [Q] and chosen.layers[0] == view.layers[0]
        assert view.table()[0]["verdict"] == "learns the task" and view.table()[1]["verdict"] is None
        assert len(view.to_pandas()) == 14

    def test_a_layer_that_repairs_is_named_in_the_findings(self, folder: Path) -> None:
        model, source = self.four_bit(folder), load_model(folder, quant_type=None, dtype=torch.float32)
        assert any("learns the task" in finding for finding in quantization_view(model).findings())
        layer = lora_layers(model)[V]
        error = layer.base_weight(torch.float32).double() - source.get_submodule(V).weight.double()
        u, s, vh = torch.linalg.svd(error, full_matrices=False)
        layer.lora_B["default"].data.copy_(-u[:, :4] * s[:4] / layer.scaling["default"])
        layer.lora_A["default"].data.copy_(vh[:4])
        findings = quantization_view(model).findings()
        assert f"the adapter repairs the quantization error in 1 layers: {V}" in findings

    def test_a_16_bit_model_as_it_would_be(self, folder: Path) -> None:
        dense = load_model(folder, quant_type=None, dtype=torch.float32)
        view = quantization_view(dense, quant_type="nf4", layers=[Q])
        (real,) = quantization_view(self.four_bit(folder), layers=[Q]).layers
        assert view.layers[0].error == real.error and view.layers[0].codes == real.codes
        assert quantization_view(dense).layers == ()

    def test_a_weight_that_is_stored_as_its_transpose(self) -> None:
        torch.manual_seed(0)
        model = nn.ModuleDict({"c": Conv1D(32, 32)})
        add_adapter(model, LoraConfig(r=4, target_modules=["c"], init_lora_weights=False))
        (found,) = quantization_view(model, quant_type="nf4").layers
        layer = lora_layers(model)["c"]
        source, d = layer.base_weight(torch.float32), layer.delta_weight("default").detach().double()
        error = quantize(source).dequantize(torch.float32).double() - source.double()
        assert found.repair is not None
        # The update is multiplied out in fp32, with 4 terms each, and meets an error that it has little to do with.
        bound = float(2 * rounding(4 + 2, 2.0))
        assert found.repair.cosine == pytest.approx(float((d * -error).sum() / (d.norm() * error.norm())), abs=bound)

    def test_refusals(self, folder: Path) -> None:
        model = self.four_bit(folder)
        with pytest.raises(CheckpointError, match="same values as the 4-bit model"):
            quantization_view(model, source=load_model(folder, dtype=torch.float32))
        with pytest.raises(AdapterError, match="no adapter 'x'"):
            quantization_view(model, adapter="x")
        model.folder = None
        with pytest.raises(CheckpointError, match="give the folder of its 16-bit weights"):
            quantization_view(model)


class Conv1D(nn.Module):
    """GPT-2's linear layer: y = x @ weight + bias."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))


WIDE = {"hidden_size": 64, "intermediate_size": 96}
