"""Combining adapters against PEFT 0.21.2: the same where PEFT is right, and where it is wrong, both shown.

Two random adapters of different scalings on one small model; the truth is the sum of their updates in float64.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_within, factored, rounding
from torch import Tensor, nn

from lorakit.adapters import combine_folders, read_adapter_folder

peft = importlib.import_module("peft")
merge_utils = importlib.import_module("peft.utils.merge_utils")

WEIGHTS = (0.7, -1.3)
PLAIN: list[dict[str, Any]] = [{"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 3}]
UNEVEN: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8, "rank_pattern": {"second": 6}},
    {"r": 2, "lora_alpha": 3, "alpha_pattern": {"first": 5}},
]
RSLORA: list[dict[str, Any]] = [{"r": 4, "lora_alpha": 8, "use_rslora": True}, {"r": 4, "lora_alpha": 3}]


# A sum of up to 12 random directions is sqrt(12) times smaller than its terms; besides the sum there are the scalings
# and the roundings of the files, on both sides. Nearest matrices come from decompositions of 40 x 24 at most.
OFF = 2 * float(rounding(12 + 4, 12**0.5))
OFF_NEAREST = OFF + 2 * float(rounding(factored(40, 24), 1.0))


def base() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(24, 40))
    model.add_module("second", nn.Linear(40, 16))
    return model


@pytest.fixture(params=["plain", "uneven", "rslora"])
def configs(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return {"plain": PLAIN, "uneven": UNEVEN, "rslora": RSLORA}[request.param]


def theirs(configs: list[dict[str, Any]], folder: Path) -> tuple[nn.Module, dict[Path, float]]:
    """PEFT's model with both adapters, and their folders with our weights."""
    both = [peft.LoraConfig(target_modules=["first", "second"], init_lora_weights=False, **c) for c in configs]
    model = peft.get_peft_model(base(), both[0], adapter_name="one")
    model.add_adapter("two", both[1])
    model.save_pretrained(folder)
    return model, {folder / "one": WEIGHTS[0], folder / "two": WEIGHTS[1]}


def their_updates(model: nn.Module, name: str) -> dict[str, Tensor]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {n.rsplit(".", 1)[-1]: layer.get_delta_weight(name).detach().double() for n, layer in layers.items()}


def truth(model: nn.Module) -> dict[str, Tensor]:
    a, b = their_updates(model, "one"), their_updates(model, "two")
    return {path: WEIGHTS[0] * a[path] + WEIGHTS[1] * b[path] for path in a}


def ours_in_peft(folder: Path) -> dict[str, Tensor]:
    """What PEFT makes of a folder that we wrote: its meaning there, not only here."""
    return their_updates(peft.PeftModel.from_pretrained(base(), folder), "default")


def off(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max(float((found[path] - expected[path]).norm() / expected[path].norm()) for path in expected)


def test_the_sum(configs: list[dict[str, Any]], tmp_path: Path) -> None:
    model, weights = theirs(configs, tmp_path)
    expected = truth(model)
    for method in ("linear", "cat"):
        combine_folders(weights, tmp_path / method, method)
        assert off(ours_in_peft(tmp_path / method), expected) < OFF
        ours = {path: layer.update().dense() for path, layer in read_adapter_folder(tmp_path / method).layers.items()}
        assert off(ours, expected) < OFF
    model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "cat", "cat")
    gain = 8**0.5 if configs is RSLORA else 1.0  # use_rslora is inherited: the new rank of 8 is divided by its root
    assert off(their_updates(model, "cat"), {path: gain * delta for path, delta in expected.items()}) < OFF


def test_the_sum_at_a_rank(configs: list[dict[str, Any]], tmp_path: Path) -> None:
    model, weights = theirs(configs, tmp_path)
    expected = truth(model)
    report = combine_folders(weights, tmp_path / "svd", "svd", rank=3)
    ours = ours_in_peft(tmp_path / "svd")
    for layer in report.layers:
        values = torch.linalg.svdvals(expected[layer.path])
        best = float(values[3:].norm() / values.norm())
        assert_within(layer.error, best, OFF_NEAREST)
        assert_within(off({"": ours[layer.path]}, {"": expected[layer.path]}), best, OFF_NEAREST)
    model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "svd", "svd", svd_rank=3)
    gain = 3**0.5 if configs is RSLORA else 1.0
    for path, delta in their_updates(model, "svd").items():
        s = torch.linalg.svdvals(expected[path])
        turned = OFF_NEAREST * s.norm() * (1 + s[0] / (s[2] - s[3]))  # nearest matrices, by the gap (Davis and Kahan)
        assert_within(delta, gain * ours[path], gain * turned)


def test_linear_is_not_a_sum_in_peft(tmp_path: Path) -> None:
    """PEFT adds the A and the B apart: B₁A₂ and B₂A₁ come in. Of the true sum, more than half is wrong."""
    model, weights = theirs(PLAIN, tmp_path)
    expected = truth(model)
    model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "linear", "linear")
    assert off(their_updates(model, "linear"), expected) > 0.5
    combine_folders(weights, tmp_path / "linear")
    assert off(ours_in_peft(tmp_path / "linear"), expected) < OFF


def test_peft_refuses_linear_for_different_ranks(tmp_path: Path) -> None:
    model, weights = theirs(UNEVEN, tmp_path)
    with pytest.raises(ValueError, match="same r value"):
        model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "linear", "linear")
    combine_folders(weights, tmp_path / "linear")
    assert off(ours_in_peft(tmp_path / "linear"), truth(model)) < OFF


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_pruning_and_ties_are_those_of_peft_on_the_updates(method: str, density: float, tmp_path: Path) -> None:
    """PEFT's functions on the dense updates, as its "ties_svd" calls them; its "ties" calls them on A and B.

    Equal weights: with others PEFT elects signs without them, which for a negative weight is the wrong sign.
    """
    model, folders = theirs(PLAIN, tmp_path)
    combine_folders(dict.fromkeys(folders, 0.8), tmp_path / "ours", method, density=density, rank=24)
    ours = ours_in_peft(tmp_path / "ours")
    a, b = their_updates(model, "one"), their_updates(model, "two")
    for path in a:
        expected = getattr(merge_utils, method)([a[path], b[path]], torch.tensor([0.8, 0.8]).double(), density)
        assert_within(ours[path], expected, OFF_NEAREST * expected.norm())


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_the_nearest_update_is_that_of_peft(method: str, tmp_path: Path) -> None:
    """Its "ties_svd" decomposes the dense matrix; ours never has it, and comes as near."""
    model, folders = theirs(PLAIN, tmp_path)
    report = combine_folders(dict.fromkeys(folders, 1.0), tmp_path / "ours", method, density=0.3, rank=4)
    ours = ours_in_peft(tmp_path / "ours")
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "theirs", f"{method}_svd", svd_rank=4, density=0.3)
    found, a, b = their_updates(model, "theirs"), their_updates(model, "one"), their_updates(model, "two")
    for layer in report.layers:
        target = getattr(merge_utils, method)([a[layer.path], b[layer.path]], torch.ones(2).double(), 0.3)
        best = (found[layer.path] - target).norm()
        bound = OFF_NEAREST * target.norm() + 1e-3 * best  # a thousandth is where our iteration ends
        assert_within((ours[layer.path] - target).norm(), best, bound)
        assert_within(layer.error * layer.norm, best, bound)


def test_dora_is_combined_in_silence_by_peft_and_refused_by_us(tmp_path: Path) -> None:
    """PEFT's result keeps use_dora, with magnitudes of its own: what the two adapters did, it does not do."""
    model, weights = theirs([c | {"use_dora": True} for c in PLAIN], tmp_path)
    model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "both", "cat")
    assert model.peft_config["both"].use_dora
    with pytest.raises(Exception, match="is a DoRA adapter"):
        combine_folders(weights, tmp_path / "ours")
