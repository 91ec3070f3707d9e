"""Per-row adapters on models other than ours: any layout whose rows can be told apart, dtypes, dropout, gradients."""

from __future__ import annotations

import pytest
import torch
from made import alone
from tolerances import assert_alike, assert_within, rounding
from torch import Tensor, nn

from lorakit import (
    Linear4bit,
    LoraConfig,
    add_adapter,
    quantize,
    set_adapter,
    use_rows,
)
from lorakit.adapters import lora_layers
from lorakit.errors import ShapeError
from lorakit.layers import BASE

# Roundings through `TestPlainModels.layers`: sums over 6 and 8 inputs and 2 ranks each, DoRA's norms, tanh.
TERMS = 2 * (6 + 8) + 2 * 4 + 12


class TestPlainModels:
    def layers(self, quantized: bool = False) -> nn.Sequential:
        torch.manual_seed(9)
        first = Linear4bit(quantize(torch.randn(8, 6)), torch.randn(8)) if quantized else nn.Linear(6, 8)
        model = nn.Sequential(first, nn.Tanh(), nn.Linear(8, 4, bias=False))
        for name, options in (("a", {}), ("b", {"use_dora": True}), ("c", {"target_modules": ["2"]})):
            add_adapter(model, LoraConfig(r=2, init_lora_weights=False, **options), name)
        return model

    def test_small_magnitudes_count_in_bf16(self) -> None:
        """A gain of 1.003 is 1 in bf16; half of the outputs must move all the same, as they do outside of rows."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64, bias=False).bfloat16())
        add_adapter(model, LoraConfig(r=2, use_dora=True))
        x = torch.randn(32, 64, dtype=torch.bfloat16)
        with torch.no_grad(), use_rows(model, ["default"] * 32):
            before = model(x)
            model[0].lora_magnitude_vector["default"].mul_(1.003)
            after = model(x)
        assert (after != before).float().mean() > 0.3
        assert_alike(after, model(x), terms=64, stores=3)  # the product, its gain less one times it, their sum

    def test_of_dropout_a_seed_is_kept(self) -> None:
        model = nn.Sequential(nn.Linear(64, 8, bias=False))
        for name, rate in (("a", 0.5), ("b", 0.25), ("none", 0.0)):
            add_adapter(model, LoraConfig(r=2, lora_dropout=rate, init_lora_weights=False), name)
        saved: list[tuple[torch.Size, torch.dtype]] = []
        x = torch.randn(60, 64, requires_grad=True)

        def keep(tensor: Tensor) -> Tensor:
            saved.append((tensor.shape, tensor.dtype))
            return tensor

        saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with saving, use_rows(model, ["a", "b", "none"] * 20):
            torch.manual_seed(3)
            y = model(x)
            torch.manual_seed(3)
            assert torch.equal(model(x), y)
        assert not any(dtype == torch.bool for _, dtype in saved)  # a mask as large as x
        assert ((), torch.int64) in {(tuple(shape), dtype) for shape, dtype in saved}
        set_adapter(model, "none")
        assert_alike(y[2::3], model(x)[2::3], terms=64 + 2 + 1)
        set_adapter(model, "a")
        assert not torch.allclose(y[::3], model.eval()(x)[::3])

    @pytest.mark.parametrize("quantized", [False, True])
    @pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 2, 3, 6)])
    def test_any_shape_whose_first_dimension_is_the_rows(self, shape: tuple[int, ...], quantized: bool) -> None:
        model, x = self.layers(quantized), torch.randn(shape)
        names = ["c", "a", BASE, "b"]
        with use_rows(model, names):
            together = model(x)
        for row, name in enumerate(names):
            alone(model, name)
            assert_alike(together[row], model(x[row : row + 1])[0], TERMS)

    def test_rows_laid_end_to_end_in_one(self) -> None:
        model, x, lengths = self.layers(), torch.randn(1, 9, 6), [2, 0, 3, 4]
        with use_rows(model, ["a", "b", BASE, "c"], lengths):
            together = model(x)
        for name, part, mine in zip(
            ["a", "b", BASE, "c"], together.split(lengths, 1), x.split(lengths, 1), strict=True
        ):
            alone(model, name)
            assert_alike(part, model(mine), TERMS)

    def test_rows_that_cannot_be_told_apart(self) -> None:
        model = self.layers()
        with use_rows(model, ["a", "b"]), pytest.raises(ShapeError, match=r"for 2 rows.*\(4,\)"):
            model(torch.randn(4, 6))
        with use_rows(model, ["a", "b"], [2, 1]), pytest.raises(ShapeError, match="do not fill"):
            model(torch.randn(4, 6))
        assert all(layer.rows is None for layer in lora_layers(model).values())

    def test_bf16_and_autocast(self) -> None:
        model, names = self.layers().bfloat16(), ["a", BASE, "b", "c"]
        x = torch.randn(4, 3, 6)
        with use_rows(model, names):
            together = model(x.bfloat16())
        assert together.dtype == torch.bfloat16
        model = model.float()
        with torch.autocast("cpu", torch.bfloat16), use_rows(model, names):
            mixed = model(x)
        with use_rows(model, names):
            exact = model(x)
        for found in (together, mixed):
            # Two layers, each with x, W, A, x A, B, two sums, and DoRA's gain or the function rounded to bf16.
            assert_within(found, exact, rounding(2 * 8, exact.abs().max(), torch.bfloat16))

    def test_gradients_are_those_of_finite_differences(self) -> None:
        model = self.layers().double()
        x = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
        named = {key: p for key, p in model.named_parameters() if ".lora_" in key and not key.endswith(".b")}
        with use_rows(model, ["c", "a", BASE, "a"]):  # DoRA's norm is a constant to its gradient: left out

            def forward(x: Tensor, *values: Tensor) -> Tensor:
                return torch.func.functional_call(model, dict(zip(named, values, strict=True)), (x,))

            assert torch.autograd.gradcheck(forward, (x, *(p.requires_grad_() for p in named.values())))


def test_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4))
    for name, options in (("a", {"r": 2}), ("b", {"r": 1, "use_dora": True})):
        add_adapter(model, LoraConfig(init_lora_weights=False, target_modules=["0", "3"], **options), name)
    x, names = torch.randn(4, 2, 4, 4), ["b", "a", BASE, "b"]
    with use_rows(model, names):
        together = model(x)
    for row, name in enumerate(names):
        alone(model, name)
        # Sums over 18 and 48 inputs, as many for DoRA's norms, and the functions.
        assert_alike(together[row : row + 1], model(x[row : row + 1]), 2 * (18 + 48) + 20)
