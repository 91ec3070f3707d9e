"""Per-row adapters: each row is what its adapter alone makes of it, and each adapter learns from its rows alone."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import ARCHITECTURES, alone, small_decoder, small_tokenizer
from tolerances import assert_alike, assert_gradients_alike, assert_within, rounding
from torch import Tensor, nn

from lorakit import (
    Decoder,
    LoraConfig,
    adapter_parameters,
    add_adapter,
    disable_adapters,
    generate,
    remove_adapter,
    set_adapter,
    set_trained,
    use_rows,
)
from lorakit.adapters import lora_layers
from lorakit.errors import AdapterError, DataError
from lorakit.layers import BASE
from lorakit.models.decoder.loss import summed_loss

# Roundings through `TestPlainModels.layers`: sums over 6 and 8 inputs and 2 ranks each, DoRA's norms, tanh.
TERMS = 2 * (6 + 8) + 2 * 4 + 12


ADAPTERS: dict[str, dict[str, Any]] = {  # of several ranks, on several layers, one with magnitudes, one rank-stabilized
    "a": {"r": 2},
    "b": {"r": 4, "target_modules": ["q_proj", "up_proj"], "lora_alpha": 3},
    "c": {"r": 3, "use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "head": {"r": 1, "target_modules": ["lm_head", "q_proj"], "use_rslora": True},
}
NAMES = [*ADAPTERS, BASE]


def assert_nearly(found: Tensor | dict[str, Tensor], expected: Tensor | dict[str, Tensor]) -> None:
    """Assert that two results of a decoder in float64 are alike, whose norms, probabilities and loss are fp32.

    Nine norms have two fp32 roundings each, and backward again; the loss has eight.
    """
    if isinstance(expected, dict):
        assert isinstance(found, dict) and found.keys() == expected.keys()
        ours, theirs = ([of[key].float() for key in found] for of in (found, expected))
        assert_gradients_alike(ours, theirs, 2 * 9 * 2 + 8)
    else:
        assert isinstance(found, Tensor)
        assert_alike(found.float(), expected.float(), 2 * 9 * 2 + 8)


def with_adapters(model: nn.Module) -> nn.Module:
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        add_adapter(model, LoraConfig(init_lora_weights=False, **options), name, torch.float64)
    set_trained(model, list(ADAPTERS))
    return model.double()


@pytest.fixture(scope="module", params=["llama-biases-tied", "qwen3"])
def decoder(request: pytest.FixtureRequest) -> nn.Module:
    return with_adapters(small_decoder(**ARCHITECTURES[request.param]))


def random_ids(*shape: int) -> Tensor:
    return torch.randint(0, 400, shape, generator=torch.Generator().manual_seed(sum(shape)))


@given(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=6), length=st.integers(1, 5))
@settings(max_examples=25)
def test_each_row_is_what_its_adapter_alone_makes_of_it(decoder: Decoder, names: list[str], length: int) -> None:
    ids = random_ids(len(names), length)
    with torch.no_grad(), use_rows(decoder, names):
        together = decoder(ids)
    for row, name in enumerate(names):
        alone(decoder, name)
        assert_nearly(together[row : row + 1], decoder(ids[row : row + 1]).detach())


@given(rows=st.lists(st.tuples(st.sampled_from(NAMES), st.integers(2, 9)), min_size=1, max_size=6))
@settings(max_examples=25)
def test_a_packed_batchs_loss_and_gradients_are_the_rows_own(decoder: Decoder, rows: list[tuple[str, int]]) -> None:
    names, lengths = [name for name, _ in rows], [length for _, length in rows]
    ids = random_ids(sum(lengths))
    targets = ids.roll(-1).masked_fill(torch.arange(len(ids)) % 3 == 0, -100)
    with use_rows(decoder, names):
        loss, found = loss_and_gradients(decoder, ids, targets, lengths)
    losses, expected = torch.zeros(()), {name: torch.zeros(()) for name in found}
    pieces = zip(names, ids.split(lengths), targets.split(lengths), lengths, strict=True)
    for name, row, wanted, length in pieces:
        alone(decoder, name)
        one, gradients = loss_and_gradients(decoder, row, wanted, [length])
        losses = losses + one
        expected = {key: expected[key] + gradients[key] for key in expected}
    assert_nearly(loss, losses)
    assert_nearly(found, expected)
    for name in set(ADAPTERS) - set(names):  # nothing, not merely zeros, from the rows of others
        assert not any(gradient.any() for key, gradient in found.items() if key.endswith(f".{name}"))


def loss_and_gradients(
    model: Decoder, ids: Tensor, targets: Tensor, lengths: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = summed_loss(model, ids, targets, lengths)
    if loss.requires_grad:
        loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in trained.items()}


@pytest.mark.parametrize("how", ["mlp", "layer"])
def test_what_is_computed_again_uses_the_rows_it_used_first(how: str) -> None:
    model = with_adapters(small_decoder())
    names, lengths, ids = ["a", BASE, "b"], [4, 3, 5], random_ids(12)
    with use_rows(model, names):
        expected = loss_and_gradients(model, ids, ids.roll(-1), lengths)[1]
        model.set_checkpointing(how)
        model.zero_grad()
        loss = summed_loss(model, ids, ids.roll(-1), lengths)
        model(random_ids(3, 2))  # another batch, laid out otherwise, comes between
    set_adapter(model, "c")  # and so does everything else, before the backward pass
    with disable_adapters(model):
        loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert_nearly(found, expected[key])
    assert {layer.active for layer in lora_layers(model, "c").values()} == {("c",)}


KINDS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding, DoRA": {"target_modules": ["embed_tokens"], "use_dora": True},
    "bias on B": {"target_modules": ["q_proj", "down_proj"], "lora_bias": True},
    "biases": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    "other biases": {"target_modules": ["q_proj"], "bias": "all"},
    "head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [1, 7, 50]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_part_differs_from_row_to_row(kind: str) -> None:
    torch.manual_seed(0)
    model = small_decoder(attention_bias=True, mlp_bias=True).double()
    for name, options in (("one", {"r": 2, **KINDS[kind]}), ("two", {"r": 3, **KINDS[kind]}), ("plain", {"r": 1})):
        add_adapter(model, LoraConfig(init_lora_weights=False, **options), name, torch.float64)
    with torch.no_grad():
        for parameter in [*adapter_parameters(model, "one"), *adapter_parameters(model, "two")]:
            parameter.add_(0.3 * torch.randn_like(parameter))
    set_trained(model, ["one", "two", "plain"])
    names, lengths = ["two", BASE, "one", "plain", "two"], [4, 4, 4, 4, 4]
    ids = random_ids(20) % 60
    with use_rows(model, names):
        together = model(ids.view(5, 4)).detach()
        found = loss_and_gradients(model, ids, ids.roll(-1), lengths)[1]
    summed = {key: torch.zeros(()) for key in found}
    for row, name in enumerate(names):
        alone(model, name)
        assert_nearly(together[row : row + 1], model(ids.view(5, 4)[row : row + 1]).detach())
        part = slice(4 * row, 4 * row + 4)
        own = loss_and_gradients(model, ids[part], ids.roll(-1)[part], [4])[1]
        summed = {key: summed[key] + own[key] for key in summed}
    assert_nearly(found, summed)


def test_parts_that_cannot_differ_are_refused_where_a_row_uses_them() -> None:
    tied = small_decoder(**ARCHITECTURES["qwen2"])
    add_adapter(tied, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]), "tokens")
    add_adapter(tied, LoraConfig(r=2, init_lora_weights=False), "plain")
    with pytest.raises(AdapterError, match="'tokens' changes a TiedModule"):
        decoder_rows(tied, ["plain", "tokens"])
    ids = random_ids(2, 3)
    with torch.no_grad():
        with use_rows(tied, ["plain", BASE]):
            together = tied(ids)
        set_adapter(tied, ["tokens"])  # active, and of no part in rows
        with use_rows(tied, ["plain", BASE]):
            assert torch.equal(tied(ids), together)


class TestDropout:
    def test_each_row_drops_at_its_adapters_rate(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        nn.init.zeros_(model[0].weight)
        for name, rate in (("none", 0.0), ("some", 0.5), ("most", 0.9)):
            add_adapter(model, LoraConfig(r=64, lora_alpha=64, lora_dropout=rate), name)
            layer = lora_layers(model)["0"]
            nn.init.eye_(layer.lora_A[name])
            nn.init.eye_(layer.lora_B[name])
        x = torch.ones(3, 50, 64)
        with use_rows(model.train(), ["most", "none", "some"]):
            y = model(x)
            assert torch.equal(model.eval()(x), x)
        kept = [float((row != 0).float().mean()) for row in y]
        assert kept == pytest.approx([0.1, 1.0, 0.5], abs=0.03)
        for row, scale in zip(y, (10.0, 1.0, 2.0), strict=True):
            # 1 - p is off by u at most, which is `scale` times as much of it; two roundings follow.
            assert_within(row[row != 0], torch.full_like(row[row != 0], scale), rounding(2 + int(scale), scale))

    def test_layers_that_share_an_input_drop_apart(self) -> None:
        model = with_adapters(small_decoder())
        add_adapter(model, LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False), "drop")
        ids = random_ids(2, 4)
        with use_rows(model.train(), ["drop", "a"]):
            first, second = model(ids), model(ids)
        assert not torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


class TestGenerating:
    PROMPTS = ("The quick brown", "The lazy", "x", "The quick brown fox jumps over")

    @pytest.fixture
    def tok(self, tmp_path: Any) -> Any:
        return small_tokenizer(tmp_path)

    @pytest.mark.parametrize("batch_size", [1, 3, 32])
    def test_every_prompt_is_answered_by_its_own_adapter(self, decoder: Decoder, tok: Any, batch_size: int) -> None:
        names = ["a", BASE, "head", "b"]
        with use_rows(decoder, names):
            together = generate(decoder, tok, self.PROMPTS, 8, batch_size=batch_size)
        expected = []
        for name, prompt in zip(names, self.PROMPTS, strict=True):
            alone(decoder, name)
            expected.append(generate(decoder, tok, prompt, 8))
        assert together == expected and len(set(expected)) > 1

    def test_prompts_with_one_beginning_do_not_share_it(self, decoder: Decoder, tok: Any) -> None:
        with use_rows(decoder, ["a", BASE]):
            answers = generate(decoder, tok, ["The quick brown fox"] * 2, 8)
        for name, answer in zip(["a", BASE], answers, strict=True):
            alone(decoder, name)
            assert generate(decoder, tok, "The quick brown fox", 8) == answer

    def test_as_many_prompts_as_rows(self, decoder: Decoder, tok: Any) -> None:
        with use_rows(decoder, ["a", BASE]), pytest.raises(DataError, match="2 rows, but there are 3 prompts"):
            generate(decoder, tok, ["x", "y", "z"], 2)


class TestContexts:
    def test_they_nest_and_end_in_any_way(self, decoder: Decoder) -> None:
        ids = random_ids(2, 3)
        set_adapter(decoder, ["a", "b"])
        with torch.no_grad():
            plain = decoder(ids)
            with disable_adapters(decoder):
                base = decoder(ids)
            with contextlib.suppress(ZeroDivisionError), use_rows(decoder, ["a", "c"]):
                rows = decoder(ids)
                with disable_adapters(decoder):
                    assert torch.equal(decoder(ids), base)
                    with use_rows(decoder, ["b", "b"]):  # nothing brings adapters back within
                        assert torch.equal(decoder(ids), base)
                with use_rows(decoder, [BASE, BASE]):
                    assert torch.equal(decoder(ids), base)
                assert torch.equal(decoder(ids), rows)
                set_adapter(decoder, "c")
                assert torch.equal(decoder(ids), rows)
                raise ZeroDivisionError
            active = decoder(ids)
            set_adapter(decoder, ["a", "b"])
            assert torch.equal(decoder(ids), plain) and not torch.equal(active, plain)

    def test_attaching_and_removing_within(self) -> None:
        model, ids = with_adapters(small_decoder()), random_ids(2, 3)
        with torch.no_grad(), use_rows(model, ["a", BASE]):
            before = model(ids)
            add_adapter(model, LoraConfig(r=1, init_lora_weights=False), "new")
            remove_adapter(model, "b")
            assert torch.equal(model(ids), before)
            with pytest.raises(AdapterError, match="'a' is in use by a row"):
                remove_adapter(model, "a")
            with use_rows(model, ["new", BASE]):
                assert torch.equal(model(ids)[1], before[1]) and not torch.equal(model(ids)[0], before[0])

    def test_names(self, decoder: Decoder) -> None:
        with pytest.raises(AdapterError, match=r"no adapter 'haed'; did you mean 'head'\? \(for a row: a, b, c"):
            decoder_rows(decoder, ["a", "haed"])
        with pytest.raises(AdapterError, match="a list with one name for each row"):
            decoder_rows(decoder, "a")
        assert decoder.rows is None

    def test_weights_that_change_within_are_seen(self) -> None:
        model, ids = with_adapters(small_decoder()), random_ids(2, 3)
        with torch.no_grad(), use_rows(model, ["a", "b"]):
            first = model(ids)
            for parameter in adapter_parameters(model, "a"):
                parameter.mul_(1.5)
            second = model(ids)
            assert torch.equal(first[1], second[1]) and not torch.equal(first[0], second[0])
            alone(model, "a")
        assert_nearly(second[:1], model(ids[:1]).detach())

    def test_a_scaling_that_changes_within_is_seen(self) -> None:
        model, ids = with_adapters(small_decoder()), random_ids(2, 3)
        with torch.no_grad(), use_rows(model, ["a", "b"]):
            first = model(ids)
            for layer in lora_layers(model, "a").values():
                layer.scaling["a"] *= 1.5
            second = model(ids)
            assert torch.equal(first[1], second[1]) and not torch.equal(first[0], second[0])

    def test_a_copied_model_has_rows_of_its_own(self) -> None:
        model, ids = with_adapters(small_decoder()), random_ids(2, 3)
        twin = copy.deepcopy(model)
        set_adapter(model, "a")
        set_adapter(twin, "b")
        with torch.no_grad(), use_rows(twin, ["a", "a"]):
            assert_nearly(twin(ids), model(ids))
        assert not torch.equal(twin(ids), model(ids))


def decoder_rows(model: nn.Module, names: Any) -> None:
    with use_rows(model, names):
        pass


def test_transformers_models_and_their_gradient_checkpointing() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = with_adapters(transformers.LlamaForCausalLM(config))
    ids, names = random_ids(4, 5) % 50, ["a", "c", BASE, "b"]

    def gradients(parts: Iterator[tuple[list[str], Tensor]]) -> dict[str, Tensor]:
        model.zero_grad()
        for names, rows in parts:
            with use_rows(model, names):
                loss = model(input_ids=rows).logits.square().sum()
                if loss.requires_grad:  # not where all rows are the base's
                    loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    with use_rows(model, names):
        together = model(input_ids=ids).logits
    for row, name in enumerate(names):
        alone(model, name)
        assert_nearly(together[row], model(input_ids=ids[row : row + 1]).logits[0])
    one_by_one = gradients(([name], row[None]) for name, row in zip(names, ids, strict=True))
    for _ in range(2):
        found = gradients(itertools.chain([(names, ids)]))
        assert_nearly(found, one_by_one)
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
