"""HiRA against PEFT's own tuner: outputs, gradients, files both ways, merges."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tolerances import assert_alike
from torch import nn

from lorakit import LoraConfig, add_adapter, load_adapter, merge_adapter, save_adapter, unmerge_adapter
from lorakit.adapters import lora_layers, read_adapter_folder
from lorakit.layers import VARIANTS


class Net(nn.Module):
    """A table, a convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.first, self.last = nn.Linear(8, 7), nn.Linear(7, 5, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.last(self.first(x.tanh()).tanh())


# Roundings through `Net`: sums over 3 ranks, 6 x 3 inputs of the convolution, 8 and 7 inputs and 3 ranks each, and two
# tanh; in each adapted layer a scaling, a product and a sum with the base weight.
TERMS = 3 + 18 + 8 + 7 + 2 * 3 + 3 * 3 + 8
IDS = torch.arange(24).view(2, 12) % 11
TARGETS = {
    "linear": ["first", "last"],
    "embedding": ["embed"],
    "all": ["embed", "first", "last"],
    "a name": r".*first",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "matrices": {},
    "a module in full": {"modules_to_save": ["conv"]},
}


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def theirs(**settings: Any) -> peft.PeftModel:
    """A model of PEFT's whose A and B are both random."""
    torch.manual_seed(1)
    model = peft.get_peft_model(net(), peft.HiraConfig(r=3, init_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hira_" in name:
                parameter.data = torch.randn_like(parameter, dtype=torch.float64) / 4
    return model.eval()


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_file_of_pefts_gives_its_outputs_and_gradients(tmp_path: Path, targets: str, settings: str) -> None:
    other = theirs(target_modules=TARGETS[targets], **SETTINGS[settings])
    other.save_pretrained(tmp_path)
    model = net()
    load_adapter(model, tmp_path, trained=True, dtype=torch.float64)
    expected, found = other(IDS), model(IDS)
    assert_alike(found, expected, TERMS)
    expected.sin().sum().backward()
    found.sin().sum().backward()
    gradients = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    for path, layer in lora_layers(model).items():
        for table in layer.matrices:
            key = f"base_model.model.{path}.{VARIANTS['hira'].endings[table]}.default"
            ours = layer.table(table)["default"].grad
            assert_alike(ours, gradients[key], 3 * TERMS)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("alpha", [3, 5])
def test_peft_reads_our_files(tmp_path: Path, targets: str, settings: str, alpha: int) -> None:
    model = net()
    config = LoraConfig(
        r=3,
        lora_alpha=alpha,
        target_modules=TARGETS[targets],
        variant="hira",
        init_lora_weights=False,
        **SETTINGS[settings],
    )
    add_adapter(model, config, dtype=torch.float64)
    save_adapter(model, tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(net(), tmp_path / "adapter", autocast_adapter_dtype=False)
    assert other.peft_config["default"].peft_type == "HIRA"
    assert_alike(other(IDS).float(), model(IDS).float(), TERMS)  # PEFT holds its matrices in fp32
    again = net()
    load_adapter(again, tmp_path / "adapter", dtype=torch.float64)
    assert_alike(again(IDS), model(IDS), TERMS)


def test_the_same_bytes_come_back(tmp_path: Path) -> None:
    other = theirs(target_modules=TARGETS["all"])
    other.save_pretrained(tmp_path / "theirs")
    model = net()
    load_adapter(model, tmp_path / "theirs", dtype=torch.float64)
    save_adapter(model, tmp_path / "ours")
    theirs_file, ours_file = (read_adapter_folder(tmp_path / side) for side in ("theirs", "ours"))
    assert theirs_file.layers.keys() == ours_file.layers.keys() == {"embed", "first", "last"}
    for path, layer in theirs_file.layers.items():
        assert layer.variant is VARIANTS["hira"] and layer.scaling == 1
        assert torch.equal(layer.lora_A, ours_file.layers[path].lora_A)
        assert torch.equal(layer.lora_B, ours_file.layers[path].lora_B)


def test_ranks_of_layers_are_lost_in_peft(tmp_path: Path) -> None:
    """PEFT's `dispatch_default` takes r from the config, whatever rank_pattern says: it reads no file with several."""
    ranks = {"target_modules": TARGETS["linear"], "rank_pattern": {"last": 2}}
    assert len(theirs(**ranks).base_model.model.last.hira_A["default"]) == 3
    model = net()
    add_adapter(model, LoraConfig(r=3, lora_alpha=3, variant="hira", init_lora_weights=False, **ranks))
    save_adapter(model, tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(net(), tmp_path)
    again = net()
    load_adapter(again, tmp_path)
    assert_alike(again(IDS).float(), model(IDS).float(), TERMS)  # B is scaled, once, in fp32


@pytest.mark.parametrize("targets", TARGETS)
def test_a_merge_gives_pefts_weights_and_comes_apart(tmp_path: Path, targets: str) -> None:
    other = theirs(target_modules=TARGETS[targets])
    other.save_pretrained(tmp_path)
    model = net()
    load_adapter(model, tmp_path, dtype=torch.float64)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    merge_adapter(model)
    expected = copy.deepcopy(other).merge_and_unload().state_dict()
    for key, tensor in model.state_dict().items():
        assert_alike(tensor, expected[key], TERMS)
    unmerge_adapter(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], tensor) for key, tensor in before.items())
