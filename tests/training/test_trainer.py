"""Training: exact losses however a step is cut up, repeatable to the bit, loud in failure."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import ARCHITECTURES, adapted, conversations, small_decoder, small_tokenizer
from small_training import CONVERSATIONS, config, logged, same, timeless, values_of
from tolerances import SMALL_DECODER, assert_within, rounding, unit
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lorakit import (
    Decoder,
    Linear4bit,
    LoraConfig,
    Record,
    Tokenizer,
    TrainConfig,
    adapter_parameters,
    add_adapter,
    generate,
    quantize,
    train,
)
from lorakit.data import Example, Message, encode_records
from lorakit.errors import ConfigError, DataError, StorageError, TrainingError
from lorakit.evaluation.perplexity import perplexity
from lorakit.training import mean_loss
from lorakit.training.trainer import accumulate_gradients


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    """Examples of uneven lengths and any masks; in some draws they all begin alike, as with a system prompt."""
    found = []
    beginning = draw(st.one_of(st.just([]), st.lists(st.integers(0, 399), min_size=1, max_size=12)))
    for number, length in enumerate(draw(st.lists(st.integers(2, 24), min_size=1, max_size=6))):
        ids = [*beginning, *draw(st.lists(st.integers(0, 399), min_size=length, max_size=length))]
        mask = draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))
        mask[draw(st.integers(0, length - 2))] = True
        found.append(Example(ids, [False] * (len(beginning) + 1) + mask, f"train.jsonl:{number + 1}"))
    return found


OF_LOSS = float(rounding(SMALL_DECODER, 1.0))  # how far a loss of random weights, all of one size, may be off
OF_GRADIENTS = float(rounding(3 * SMALL_DECODER, 1.0))  # the roundings forward and, twice as many, backward


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Assert that gradients differ by no more than `OF_GRADIENTS`.

    Against the norm of them all: those of q and k are nothing but rounding where every trained token sees only itself.
    """
    a, b = (torch.cat([gradient.reshape(-1) for gradient in of]) for of in (ours, theirs))
    assert (a - b).norm() <= 2 * OF_GRADIENTS * b.norm()


# Steps in proportion to the gradients: Adam with a small eps makes a whole step of what is nothing but rounding.
SMOOTH = config(eps=1.0)


class TestOneStep:
    MODEL = adapted(init_lora_weights=False)

    def gradients(self, batch: list[Example], budget: int) -> tuple[float, int, list[Tensor]]:
        parameters = [p for p in self.MODEL.parameters() if p.requires_grad]
        self.MODEL.zero_grad()
        loss, trained = accumulate_gradients(self.MODEL, batch, budget)
        return loss, trained, [p.grad.clone() for p in parameters]

    @given(batch=examples(), budget=st.sampled_from([1, 10, 25, 40]))
    @settings(max_examples=30, deadline=None)
    def test_micro_batches_add_up_to_the_whole(self, batch: list[Example], budget: int) -> None:
        loss, trained, gradients = self.gradients(batch, 10_000)
        other_loss, other_trained, other_gradients = self.gradients(batch, budget)
        assert trained == other_trained == sum(sum(example.loss_mask) for example in batch)
        assert other_loss == pytest.approx(loss, rel=OF_LOSS)
        assert_close(other_gradients, gradients)

    @given(batch=examples())
    @settings(max_examples=15, deadline=None)
    def test_the_loss_is_the_mean_over_trained_tokens(self, batch: list[Example]) -> None:
        loss, _, gradients = self.gradients(batch, 30)
        parts = []
        for example in batch:
            logits = self.MODEL(torch.tensor([example.input_ids]))[0, :-1]
            mask = torch.tensor(example.loss_mask[1:])
            parts.append(cross_entropy(logits, torch.tensor(example.input_ids[1:]), reduction="none")[mask])
        plain = torch.cat(parts).mean()
        expected = torch.autograd.grad(plain, [p for p in self.MODEL.parameters() if p.requires_grad])
        assert loss == pytest.approx(plain.item(), rel=OF_LOSS)
        assert_close(gradients, list(expected))

    def test_nothing_to_train_in_the_batch(self) -> None:
        untrained = Example([1, 2, 3], [False] * 3, "train.jsonl:7")
        with pytest.raises(DataError, match=r"no token of this batch is trained \(train.jsonl:7\)"):
            accumulate_gradients(self.MODEL, [untrained], 100)

    def test_mean_loss_in_eval_mode_without_gradient(self, tok: Tokenizer) -> None:
        model = adapted(lora_dropout=0.5, init_lora_weights=False).train()
        batch = encode_records(tok, CONVERSATIONS, 100)
        first, second = mean_loss(model, batch, 1000), mean_loss(model, batch, 20)
        assert first == pytest.approx(second, rel=OF_LOSS)
        assert first == pytest.approx(accumulate_gradients(model.eval(), batch, 1000)[0], rel=OF_LOSS)
        assert not model.training
        with pytest.raises(DataError, match="no example"):
            mean_loss(model, [], 100)


class TestLearning:
    @pytest.mark.parametrize("quantized", [False, True])
    @pytest.mark.parametrize("architecture", ["llama", "qwen3"])
    def test_a_small_model_learns_its_conversations_by_heart(
        self, architecture: str, quantized: bool, tok: Tokenizer
    ) -> None:
        model = small_decoder(**ARCHITECTURES[architecture])
        model.lm_head.weight.data *= 4  # or no hidden state could be sure of a token
        if quantized:
            for layer in model.model.layers:
                layer.mlp.up_proj = Linear4bit(quantize(layer.mlp.up_proj.weight))
        frozen = {name: t.clone() for name, t in model.state_dict().items()}
        torch.manual_seed(0)
        add_adapter(model, LoraConfig(r=16, lora_alpha=32))
        records = conversations(4)
        result = train(model, tok, records, config(lr=1e-2, max_steps=40), eval_records=records)
        assert result.history[-1]["loss"] < 0.05 * result.history[0]["loss"]
        assert result.eval_loss is not None and result.eval_loss < 0.1
        questions = [[record.as_dicts()[0]] for record in records]
        assert generate(model, tok, questions, 16) == [record.messages[1].content for record in records]
        after = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items()}
        assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())

    def test_the_result_and_the_history_say_what_happened(self, tok: Tokenizer, tmp_path: Path) -> None:
        held_out = conversations(3, start=20)
        result = train(adapted(), tok, CONVERSATIONS, config(eval_every=2, output=tmp_path), held_out)
        assert result.steps == len(result.history) == 6
        assert [row["step"] for row in result.history] == [1, 2, 3, 4, 5, 6]
        assert ["eval_loss" in row for row in result.history] == [False, True] * 3
        assert result.eval_loss == result.history[-1]["eval_loss"]
        encoded = encode_records(tok, CONVERSATIONS, 100)
        for start in (0, 3):  # ten conversations in steps of 4, 4 and 2: an epoch is three steps
            epoch = result.history[start : start + 3]
            assert sum(row["tokens"] for row in epoch) == sum(len(e.input_ids) for e in encoded)
            assert sum(row["trained_tokens"] for row in epoch) == sum(sum(e.loss_mask) for e in encoded)
        assert result.tokens == sum(row["tokens"] for row in result.history)
        assert result.trained_tokens == sum(row["trained_tokens"] for row in result.history)
        assert logged(tmp_path) == result.history
        seconds = [row["seconds"] for row in result.history]
        assert seconds == sorted(seconds) and 0 < seconds[-1] <= result.seconds
        assert all(row["peak_rss_mb"] > 10 and math.isfinite(row["grad_norm"]) for row in result.history)

    @pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2, 6), (0.5, 2), (0.01, 1), (1.5, 4)])
    def test_epochs(self, epochs: float, steps: int, tok: Tokenizer) -> None:
        assert train(adapted(), tok, CONVERSATIONS, config(max_steps=None, epochs=epochs)).steps == steps

    def test_the_learning_rate_is_the_schedules(self, tok: Tokenizer) -> None:
        rows = train(adapted(), tok, CONVERSATIONS, config(warmup_ratio=0.5, min_lr_ratio=0.1)).history
        assert [row["lr"] for row in rows[:4]] == pytest.approx([5e-3 / 3, 1e-2 / 3, 5e-3, 5e-3])
        assert rows[4]["lr"] > rows[5]["lr"] > 5e-4

    def test_a_large_gradient_is_clipped(self, tok: Tokenizer) -> None:
        model = adapted()
        before = values_of(model)
        train(model, tok, CONVERSATIONS, config(max_steps=1, max_grad_norm=1e-12, lr=1.0, eps=1.0))
        # No gradient is above 1e-12, and eps = 1 and lr = 1 make a step of at most that; the sum is rounded.
        for after, start in zip(values_of(model), before, strict=True):
            assert_within(after, start, 1.001e-12 + unit(torch.float32) * start.abs())

    def test_only_the_active_adapter_is_trained(self, tok: Tokenizer) -> None:
        model = adapted(init_lora_weights=False)
        first = values_of(model)
        add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"]), "second")
        train(model, tok, CONVERSATIONS, config())
        assert same([p for name, p in model.named_parameters() if name.endswith("default")], first)
        assert all(p.abs().sum() > 0 for p in adapter_parameters(model, "second"))

    def test_the_mode_is_restored(self, tok: Tokenizer) -> None:
        for training in (True, False):
            model = adapted().train(training)
            train(model, tok, CONVERSATIONS, config(max_steps=1), CONVERSATIONS)
            assert model.training is training

    def test_gradients_left_by_the_caller_do_not_count(self, tok: Tokenizer) -> None:
        clean, dirty = adapted(), adapted()
        dirty(torch.tensor([[1, 2, 3]])).square().sum().backward()
        for model in (clean, dirty):
            train(model, tok, CONVERSATIONS, config(max_steps=2))
        assert same(values_of(clean), values_of(dirty))

    def test_an_adapted_output_head(self, tok: Tokenizer) -> None:
        model = adapted(target_modules=["lm_head"])
        rows = train(model, tok, conversations(4), config(max_steps=30, lr=2e-2)).history
        assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
        assert perplexity(model, tok, "The lazy dog does not mind.") > 1

    def test_a_model_that_knows_only_rectangles_and_logits(self, tok: Tokenizer) -> None:
        """As transformers' models are called: padded ids with a mask in, an object with logits out."""

        class Other(nn.Module):
            def __init__(self, decoder: Decoder) -> None:
                super().__init__()
                self.decoder = decoder

            def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
                assert attention_mask.shape == input_ids.shape  # padding comes last: causality hides it
                return SimpleNamespace(logits=self.decoder(input_ids))

        ours, theirs = adapted(), Other(adapted())
        rows = [train(model, tok, CONVERSATIONS, SMOOTH, CONVERSATIONS).history for model in (ours, theirs)]
        bounds = {"loss": OF_LOSS, "grad_norm": 2 * OF_GRADIENTS, "trained_tokens": 0.0, "tokens": 0.0}
        for key, bound in bounds.items():
            assert [row[key] for row in rows[0]] == pytest.approx([row[key] for row in rows[1]], rel=bound, abs=0)


class TestRepeatability:
    def test_a_seed_repeats_to_the_bit_with_dropout(self, tok: Tokenizer) -> None:
        models = [adapted(lora_dropout=0.3) for _ in range(2)]
        results = []
        for model in models:
            torch.rand(3)  # the global generator's state does not matter
            results.append(train(model, tok, CONVERSATIONS, config(seed=3)))
        assert same(*map(values_of, models))
        assert timeless(results[0].history) == timeless(results[1].history)

    def test_another_seed_gives_another_run(self, tok: Tokenizer) -> None:
        models = [adapted(), adapted()]
        for seed, model in enumerate(models):
            train(model, tok, CONVERSATIONS, config(seed=seed))
        assert not same(*map(values_of, models))

    def test_micro_batches_change_memory_not_the_result(self, tok: Tokenizer) -> None:
        start, ends = torch.cat([p.flatten() for p in values_of(adapted())]), []
        for budget in (10_000, 20):
            model = adapted()
            train(model, tok, CONVERSATIONS, SMOOTH.model_copy(update={"micro_batch_tokens": budget}))
            ends.append(torch.cat([p.flatten() for p in values_of(model)]))
        way = (ends[0] - start).norm()
        # Each step of the way is as exact as its gradient, and each sum of a parameter and a step is rounded.
        bound = OF_GRADIENTS * way + SMOOTH.max_steps * unit(torch.float32) * ends[0].norm()
        assert way > 100 * bound and (ends[1] - ends[0]).norm() <= 2 * bound

    def test_evaluating_and_saving_on_the_way_change_nothing(self, tok: Tokenizer, tmp_path: Path) -> None:
        plain, watched = adapted(lora_dropout=0.3), adapted(lora_dropout=0.3)
        train(plain, tok, CONVERSATIONS, config())
        often = config(eval_every=1, checkpoint_every=1, output=tmp_path)
        train(watched, tok, CONVERSATIONS, often, CONVERSATIONS)
        assert same(values_of(plain), values_of(watched))

    def test_without_an_output_nothing_is_written(
        self, tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        train(adapted(), tok, CONVERSATIONS, config(checkpoint_every=1))
        assert list(tmp_path.iterdir()) == []


class TestFailures:
    def test_nothing_trainable(self, tok: Tokenizer) -> None:
        with pytest.raises(TrainingError, match="no trainable parameter; attach an adapter"):
            train(small_decoder(), tok, CONVERSATIONS, config())

    def test_no_records(self, tok: Tokenizer) -> None:
        with pytest.raises(DataError, match="no training record"):
            train(adapted(), tok, [], config())

    @pytest.mark.parametrize("side", ["train", "eval"])
    def test_records_that_are_too_long_are_named_before_anything_happens(
        self, side: str, tok: Tokenizer, tmp_path: Path
    ) -> None:
        long = Record((Message("user", "a" * 90), Message("assistant", "b")), "long.jsonl:3")
        records = {"train": CONVERSATIONS, "eval": CONVERSATIONS} | {side: [*CONVERSATIONS, long]}
        with pytest.raises(DataError, match=r"long.jsonl:3: .* max_length is 50"):
            train(adapted(), tok, records["train"], config(max_length=50, output=tmp_path), records["eval"])
        model = small_decoder(max_position_embeddings=64)
        add_adapter(model, LoraConfig(r=1))
        with pytest.raises(DataError, match=r"context of 64 tokens: long.jsonl:3 \(\d+\)"):
            train(model, tok, records["train"], config(output=tmp_path), records["eval"])
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_loss_that_is_not_finite_stops_before_the_parameters_change(
        self, value: float, tok: Tokenizer, tmp_path: Path
    ) -> None:
        model = adapted(init_lora_weights=False)
        model.model.norm.weight.data[3] = value
        before = values_of(model)
        with pytest.raises(TrainingError, match=r"the loss is nan .* on train.jsonl:\d+"):
            train(model, tok, CONVERSATIONS, config(output=tmp_path))
        assert same(values_of(model), before)
        assert logged(tmp_path) == []
        model.model.norm.weight.data[3] = 1.0  # repaired; what the failed step left must not count
        fresh = adapted(init_lora_weights=False)
        fresh.model.norm.weight.data[3] = 1.0
        for each in (model, fresh):
            train(each, tok, CONVERSATIONS, config(max_steps=2))
        assert same(values_of(model), values_of(fresh))

    def test_a_run_that_diverges_says_so(self, tok: Tokenizer) -> None:
        model = adapted(init_lora_weights=False)
        with pytest.raises(TrainingError, match="lower the learning rate"):
            train(model, tok, CONVERSATIONS, config(lr=1e30, max_steps=30, warmup_ratio=0))
        assert all(torch.isfinite(value).all() for value in values_of(model))

    @pytest.mark.parametrize(
        "values",
        [
            {"lr": 0}, {"lr": float("nan")}, {"lr": float("inf")}, {"epochs": float("inf")}, {"epochs": 0},
            {"max_steps": 0}, {"batch_size": 0}, {"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}, {"betas": (0.9,)},
            {"warmup_ratio": 1.0}, {"seed": -1}, {"seed": 2**63}, {"eval_every": 0}, {"max_grad_norm": 0},
            {"micro_batch_tokens": 0}, {"max_length": 1}, {"eps": 0}, {"weight_decay": -1}, {"learning_rate": 1},
        ],
        ids=str,
    )  # fmt: skip
    def test_settings_out_of_range(self, values: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(values))):
            TrainConfig(**values)

    @pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
    def test_a_full_disk(self, tok: Tokenizer, tmp_path: Path) -> None:
        import resource

        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))  # EFBIG instead of ENOSPC, at the fifth line or so
        try:
            with pytest.raises(StorageError, match=r"cannot write .*train.jsonl"):
                train(adapted(), tok, CONVERSATIONS, config(output=tmp_path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
