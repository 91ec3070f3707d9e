"""The optimizers against bitsandbytes' and PEFT's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from small_training import update_ratio
from torch import nn

from lorakit import Decoder, LoraConfig, TrainConfig, add_adapter, save_adapter
from lorakit.training.optimizers import AdamW8bit
from lorakit.training.optimizers.build import build_optimizer

peft = importlib.import_module("peft")
create_loraplus_optimizer = importlib.import_module("peft.optimizers").create_loraplus_optimizer


@pytest.mark.parametrize("steps", [2, 10, 60])
def test_the_size_of_a_step(steps: int) -> None:
    """bitsandbytes' steps are a fifth to a quarter shorter than AdamW's on the CPU, whatever the learning rate says."""
    ours, theirs = (update_ratio(kind, steps, sparsity=0.0) for kind in (AdamW8bit, bnb.optim.AdamW8bit))
    print(f"median step after {steps}, of torch's AdamW: lorakit {ours:.3f}, bitsandbytes {theirs:.3f}")
    assert ours == pytest.approx(1, abs=0.03)
    assert theirs < 0.9


def test_lora_plus_has_pefts_learning_rates(
    our_model: Decoder, their_model: nn.Module, fresh: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    add_adapter(ours := fresh(our_model), LoraConfig(r=2, target_modules="all-linear"))
    theirs = peft.PeftModel.from_pretrained(fresh(their_model), save_adapter(ours, tmp_path), is_trainable=True)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    expected = rates(theirs, optimizer)
    parameters = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    found = rates(ours, build_optimizer(parameters, TrainConfig(lr=1e-3, loraplus_lr_ratio=16)))
    assert set(found.values()) == {1e-3, 16e-3}
    assert found == {name.removeprefix("base_model.model."): lr for name, lr in expected.items()}


def rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rate of each trained parameter, without the adapter's name."""
    of = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = {p: name for name, p in model.named_parameters()}
    return {names[p].removesuffix(".weight").removesuffix(".default"): lr for p, lr in of.items() if p.requires_grad}
