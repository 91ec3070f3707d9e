"""What HiRA's change of the weight, which is not of low rank, means to everything that asks a variant about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from made import small_decoder, write_checkpoint
from tolerances import SMALL_DECODER, assert_alike

import lorakit as lk
from lorakit.adapters import combine_adapters, lora_layers
from lorakit.errors import AdapterError

IDS = torch.arange(24).view(2, 12) + 100


def adapted(model: Any, name: str = "default", **settings: Any) -> Any:
    torch.manual_seed(1)
    lk.add_adapter(model, lk.LoraConfig(r=2, init_lora_weights=False, **({"variant": "hira"} | settings)), name)
    return model


def test_each_row_has_its_own() -> None:
    model = adapted(adapted(small_decoder()), "plain", variant="plain")
    with lk.use_rows(model, ["default", "plain"]):
        together = model(IDS)
    for row, name in enumerate(("default", "plain")):
        lk.set_adapter(model, name)
        assert_alike(together[row], model(IDS)[row], SMALL_DECODER)


def test_another_adapter_is_not_merged_beneath_it() -> None:
    model = adapted(adapted(small_decoder()), "plain", variant="plain")
    with pytest.raises(AdapterError, match="'default' scales the entries of the weight and would scale the merged"):
        lk.merge_adapter(model, "plain")
    lk.set_adapter(model, ["default", "plain"])
    expected = model(IDS)
    lk.merge_adapter(model, ["default", "plain"])
    assert_alike(model(IDS), expected, SMALL_DECODER)


def test_four_bits_alone_do_not_take_it(tmp_path: Path) -> None:
    model = adapted(lk.load_model(write_checkpoint(tmp_path / "base", small_decoder()), dtype=torch.float32))
    with pytest.raises(AdapterError, match="not of low rank, and 4 bits alone would lose it; give a 16-bit base"):
        lk.merge_adapter(model, base=False, quantize=True)
    expected = model(IDS)
    lk.merge_adapter(model, base=False, quantize=False)
    assert_alike(model(IDS), expected, SMALL_DECODER)


def test_what_needs_low_rank_says_why(tmp_path: Path) -> None:
    model = adapted(small_decoder())
    with pytest.raises(AdapterError, match=r"'default' is a HiRA adapter: its change of the base.*not of low rank"):
        combine_adapters(model, {"default": 1.0}, "new")
    with pytest.raises(AdapterError, match="variant 'hira': HiRA, which multiplies the base weight"):
        lk.save_adapter(model, tmp_path / "export", target="vllm")


def test_inspection_measures_the_factors_and_not_the_change(tmp_path: Path) -> None:
    model = adapted(small_decoder())
    lk.save_adapter(model, tmp_path / "adapter")
    for info in (lk.inspect_adapter(model), lk.inspect_adapter(tmp_path / "adapter", base=small_decoder())):
        assert all(layer.base is None and layer.rank == 2 for layer in info.layers)


def test_values_are_swapped_in_place(tmp_path: Path) -> None:
    first, second = adapted(small_decoder()), adapted(small_decoder())
    for layer in lora_layers(second).values():
        layer.lora_B["default"].data *= 2
    lk.save_adapter(second, tmp_path / "second")
    lk.swap_adapter(first, "default", tmp_path / "second")
    assert torch.equal(first(IDS), second(IDS))
    lk.save_adapter(adapted(small_decoder(), variant="plain"), tmp_path / "plain")
    with pytest.raises(lk.LorakitError, match="it is LoRA, unlike the adapter in place"):
        lk.swap_adapter(first, "default", tmp_path / "plain")
