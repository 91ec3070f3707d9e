"""How settings become an optimizer, LoRA+'s groups, and runs that resume to the bit with each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from made import adapted, small_tokenizer
from small_training import CONVERSATIONS, config, interrupted, same, timeless, values_of
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toy_optimizer import SignDescent

from lorakit import Tokenizer, TrainConfig, train
from lorakit.errors import ConfigError, TrainingError
from lorakit.training.optimizers import OPTIMIZERS, SMALLEST_8BIT, AdamW, AdamW8bit, Lion
from lorakit.training.optimizers.build import build_optimizer, set_learning_rate

KINDS: dict[str, type[torch.optim.Optimizer]] = {"adamw": AdamW, "adamw_8bit": AdamW8bit, "lion": Lion}


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("name", KINDS)
def test_the_settings_choose(name: str) -> None:
    parameters = {"weight": nn.Parameter(torch.ones(2))}
    given = {"lr": 0.5, "betas": (0.8, 0.7), "weight_decay": 0.2} | ({} if name == "lion" else {"eps": 1e-3})
    optimizer = build_optimizer(parameters, TrainConfig(optimizer=name, **given))
    assert type(optimizer) is KINDS[name]
    (group,) = optimizer.param_groups
    assert given.items() <= group.items()


@pytest.mark.parametrize(
    ("name", "betas"), [("adamw", (0.9, 0.999)), ("adamw_8bit", (0.9, 0.999)), ("lion", (0.9, 0.99))]
)
def test_betas_that_are_not_given_are_the_optimizers_own(name: str, betas: tuple[float, float]) -> None:
    optimizer = build_optimizer({"weight": nn.Parameter(torch.ones(2))}, TrainConfig(optimizer=name))
    assert optimizer.param_groups[0]["betas"] == betas


def test_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer: unknown 'lino'; did you mean 'lion'\? \(known: adamw, .*lion\)"):
        TrainConfig(optimizer="lino")


@pytest.mark.parametrize("size", [1, SMALLEST_8BIT - 1, SMALLEST_8BIT, SMALLEST_8BIT + 1])
@pytest.mark.parametrize("name", KINDS)
def test_the_state_is_what_the_optimizer_says_it_keeps(name: str, size: int) -> None:
    parameter = nn.Parameter(torch.ones(size))
    parameter.grad = torch.ones(size)
    optimizer = build_optimizer({"weight": parameter}, TrainConfig(optimizer=name))
    optimizer.step()
    assert {key: value.nbytes for key, value in optimizer.state[parameter].items()} == optimizer.state_bytes(size)


def test_a_new_optimizer_resumes(tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sign", SignDescent)
    run = config(optimizer="sign", output=tmp_path / "run", checkpoint_every=2, lr=1e-3)
    whole, stopped, resumed = (adapted() for _ in range(3))
    train(whole, tok, CONVERSATIONS, run.model_copy(update={"output": None}))
    interrupted(stopped, tok, run, at_pass=4)
    train(resumed, tok, CONVERSATIONS, run, resume=True)
    assert same(values_of(resumed), values_of(whole)) and not same(values_of(whole), values_of(adapted()))


class TestLoraPlus:
    def test_b_of_linear_layers_is_faster_and_nothing_else(self) -> None:
        parameters = {
            name: nn.Parameter(torch.ones(2))
            for name in ("q.lora_A.x", "q.lora_B.x", "embed.lora_embedding_B.x", "q.bias", "my_lora_B.weight")
        }
        optimizer = build_optimizer(parameters, TrainConfig(lr=1e-3, loraplus_lr_ratio=16))
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert {name: rates[id(p)] for name, p in parameters.items()} == {
            name: 16e-3 if name == "q.lora_B.x" else 1e-3 for name in parameters
        }
        set_learning_rate(optimizer, 1e-5)
        assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 16e-5]

    @pytest.mark.parametrize("name", KINDS)
    def test_the_schedule_keeps_the_ratio(self, name: str, tok: Tokenizer) -> None:
        rates: list[list[float]] = []

        def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])

        hook = register_optimizer_step_pre_hook(record)
        history = train(adapted(), tok, CONVERSATIONS, config(optimizer=name, loraplus_lr_ratio=8)).history
        hook.remove()
        assert rates == [[row["lr"], 8 * row["lr"]] for row in history]
        assert len({row["lr"] for row in history}) == 5  # of six; the peak comes twice

    @pytest.mark.parametrize("name", KINDS)
    def test_a_ratio_of_one_is_plain_lora_and_a_larger_one_moves_b_further(self, name: str, tok: Tokenizer) -> None:
        models = {ratio: adapted() for ratio in (None, 1, 4)}
        for ratio, model in models.items():
            settings = config(optimizer=name, loraplus_lr_ratio=ratio, max_steps=1, lr=1e-3)
            train(model, tok, CONVERSATIONS, settings)
        assert same(values_of(models[1]), values_of(models[None]))
        for (key, plain), (_, plus) in zip(models[None].named_parameters(), models[4].named_parameters(), strict=True):
            if "lora_B" in key:  # from zero, after one step
                assert torch.equal(plus, 4 * plain)  # a power of two scales every rounding
            else:
                assert torch.equal(plus, plain)

    def test_without_any_b_it_says_so(self) -> None:
        with pytest.raises(TrainingError, match="no lora_B is trained"):
            build_optimizer({"bias": nn.Parameter(torch.ones(2))}, TrainConfig(loraplus_lr_ratio=16))
        with pytest.raises(ConfigError, match="loraplus_lr_ratio"):
            TrainConfig(loraplus_lr_ratio=0.5)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_run_resumes_to_the_bit(name: str, offload: bool, tok: Tokenizer, tmp_path: Path) -> None:
    """In both directions: with offloading stopped without it, and the other way round."""
    run = config(
        optimizer=name, output=tmp_path / "run", checkpoint_every=2, loraplus_lr_ratio=2, offload_optimizer=offload
    )
    whole, stopped, resumed = (adapted(r=96) for _ in range(3))
    assert max(p.numel() for p in values_of(whole)) >= SMALLEST_8BIT > min(p.numel() for p in values_of(whole))
    expected = train(whole, tok, CONVERSATIONS, run.model_copy(update={"output": None, "offload_optimizer": False}))
    interrupted(stopped, tok, run, at_pass=4)
    other = run.model_copy(update={"offload_optimizer": not offload})
    result = train(resumed, tok, CONVERSATIONS, other, resume=True)
    assert same(values_of(resumed), values_of(whole))
    assert timeless(result.history) == timeless(expected.history)


def test_eight_bits_learn_nearly_what_thirty_two_do(tok: Tokenizer) -> None:
    in_8_bits, in_32_bits = adapted(r=96), adapted(r=96)
    train(in_8_bits, tok, CONVERSATIONS, config(optimizer="adamw_8bit"))
    train(in_32_bits, tok, CONVERSATIONS, config())
    for ours, theirs in zip(values_of(in_8_bits), values_of(in_32_bits), strict=True):
        assert not torch.equal(ours, theirs) or ours.numel() < SMALLEST_8BIT
        assert (ours - theirs).norm() < 0.1 * theirs.norm()


def test_a_run_resumes_with_the_optimizers_own_betas_written_out_and_with_no_others(
    tok: Tokenizer, tmp_path: Path
) -> None:
    run = config(optimizer="lion", output=tmp_path / "run", checkpoint_every=2)
    interrupted(adapted(), tok, run, at_pass=4)
    with pytest.raises(TrainingError, match="other settings"):
        train(adapted(), tok, CONVERSATIONS, run.model_copy(update={"betas": (0.9, 0.999)}), resume=True)
    assert train(adapted(), tok, CONVERSATIONS, run.model_copy(update={"betas": (0.9, 0.99)}), resume=True).steps == 6
