"""The decoder against a naive restatement of it, and its ways of laying out a batch against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import ARCHITECTURES, VOCABULARY, small_config, small_decoder
from tolerances import SMALL_DECODER, assert_alike, assert_gradients_alike
from torch import Tensor
from torch.nn.functional import linear, silu

from lorakit import Decoder, LoraConfig, add_adapter
from lorakit.errors import ShapeError
from lorakit.models import DecoderConfig
from lorakit.models.decoder.cache import KVCache
from lorakit.models.decoder.loss import summed_loss

LONGEST = 40 + 30  # keys that a token attends to at most, where nothing else is said


LENGTHS = [[5], [1, 1, 1], [4, 4], [3, 9, 4, 4, 1], [16, 12, 11, 2, 2, 30]]


def some_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def naive_logits(model: Decoder, ids: Tensor) -> Tensor:
    """One sequence (tokens,), one head after the other, straight from the papers; in float64."""
    config, weights = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return weights[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def project(x: Tensor, name: str) -> Tensor:
        return linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    half = config.head_dim // 2
    angles = [[position * config.rope_theta ** (-i / half) for i in range(half)] for position in range(len(ids))]
    turn = torch.polar(torch.ones(len(ids), half, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))

    def rotate(x: Tensor) -> Tensor:
        turned = torch.complex(x[:, :half], x[:, half:]) * turn
        return torch.cat([turned.real, turned.imag], dim=1)

    mask = torch.full((len(ids), len(ids)), float("-inf"), dtype=torch.float64).triu(1)
    x = weights["model.embed_tokens.weight"][ids]
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        y = norm(x, f"{layer}.input_layernorm")
        q, k, v = (project(y, f"{layer}.self_attn.{name}_proj").split(config.head_dim, dim=1) for name in "qkv")
        if config.qk_norm:
            q = [norm(head, f"{layer}.self_attn.q_norm") for head in q]
            k = [norm(head, f"{layer}.self_attn.k_norm") for head in k]
        heads = []
        for number, query in enumerate(q):
            shared = number * len(k) // len(q)
            scores = rotate(query) @ rotate(k[shared]).T / config.head_dim**0.5
            heads.append((scores + mask).softmax(dim=1) @ v[shared])
        x = x + project(torch.cat(heads, dim=1), f"{layer}.self_attn.o_proj")
        y = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = (project(y, f"{layer}.mlp.{name}_proj") for name in ("gate", "up"))
        x = x + project(silu(gate) * up, f"{layer}.mlp.down_proj")
    return project(norm(x, "model.norm"), "lm_head")


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Decoder:
    return small_decoder(**ARCHITECTURES[request.param])


def new_cache(model: Decoder, padding: list[int], prefix: KVCache | None = None, capacity: int = 64) -> KVCache:
    config = model.config
    sizes = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    return KVCache(*sizes, torch.tensor(padding), capacity, model.dtype, prefix=prefix)


def test_logits_are_those_of_the_papers(model: Decoder) -> None:
    ids = some_ids(2, 11)
    logits = model(ids)
    assert logits.shape == (2, 11, VOCABULARY) and logits.dtype == torch.float32
    for row in range(2):
        assert_alike(logits[row], naive_logits(model, ids[row]).float(), SMALL_DECODER)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_sequences_do_not_see_each_other(model: Decoder, lengths: list[int]) -> None:
    ids = some_ids(sum(lengths))
    packed = model.hidden_states(ids, lengths)
    alone = torch.cat([model.hidden_states(part[None])[0] for part in ids.split(lengths)])
    assert_alike(packed, alone, SMALL_DECODER + LONGEST)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_any_lengths_may_be_packed(lengths: list[int]) -> None:
    model = small_decoder()
    ids = some_ids(sum(lengths))
    alone = torch.cat([model.hidden_states(part, [len(part)]) for part in ids.split(lengths)])
    assert_alike(model.hidden_states(ids, lengths), alone, SMALL_DECODER + LONGEST)


def test_a_rectangle_is_its_rows(model: Decoder) -> None:
    ids = some_ids(3, 7)
    rectangle = model.hidden_states(ids)
    assert_alike(rectangle.view(21, -1), model.hidden_states(ids.view(-1), [7, 7, 7]), SMALL_DECODER + LONGEST)
    assert_alike(rectangle[1:2], model.hidden_states(ids[1:2]), SMALL_DECODER + LONGEST)


def test_no_token_sees_a_later_one(model: Decoder) -> None:
    ids = some_ids(1, 9)
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % VOCABULARY
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.isclose(before[:, 6:], after[:, 6:]).all(dim=-1).any()


def test_long_sequences_take_another_way_to_the_same_numbers() -> None:
    model = small_decoder()
    ids = some_ids(620)
    packed = model.hidden_states(ids, [600, 20])
    assert_alike(packed[600:], model.hidden_states(ids[600:], [20]), SMALL_DECODER + LONGEST)
    assert_alike(packed[:300], model.hidden_states(ids[:300], [300]), SMALL_DECODER + 2 * 300)


@pytest.mark.parametrize("lengths", LENGTHS[1:])
def test_the_gradient_of_a_packed_batch_is_the_sum_of_its_sequences(model: Decoder, lengths: list[int]) -> None:
    torch.manual_seed(0)
    add_adapter(model, LoraConfig(r=2, init_lora_weights=False))
    parameters = [p for p in model.parameters() if p.requires_grad]
    ids, targets = some_ids(sum(lengths)), some_ids(sum(lengths), seed=1)
    targets[::3] = -100
    together = torch.autograd.grad(summed_loss(model, ids, targets, lengths), parameters)
    one_by_one = [torch.zeros_like(p) for p in parameters]
    for part, target in zip(ids.split(lengths), targets.split(lengths), strict=True):
        gradients = torch.autograd.grad(summed_loss(model, part, target, [len(part)]), parameters)
        one_by_one = [total + gradient for total, gradient in zip(one_by_one, gradients, strict=True)]
    assert_gradients_alike(together, one_by_one, 3 * (SMALL_DECODER + LONGEST) + len(ids))


def with_prefix(prefix: int, lengths: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """Return sequences laid end to end that all begin with the same tokens, untrained targets, and their lengths."""
    head = some_ids(prefix, seed=5)
    rests = [some_ids(length, seed=index) for index, length in enumerate(lengths)]
    rests = [torch.cat([torch.tensor([7 + index]), rest[1:]]) for index, rest in enumerate(rests)]  # they part here
    ids = torch.cat([torch.cat([head, rest]) for rest in rests])
    targets = torch.cat([torch.cat([head.new_full((prefix,), -100), rest]) for rest in rests])
    return ids, targets, [prefix + length for length in lengths]


class TestSharedPrefix:
    @given(st.integers(1, 30), st.lists(st.integers(1, 40), min_size=1, max_size=8))
    @settings(max_examples=25, deadline=None)
    def test_computed_once_it_is_as_if_it_began_each_sequence(self, prefix: int, lengths: list[int]) -> None:
        model = small_decoder()
        ids, _, whole = with_prefix(prefix, lengths)
        alone = [model.hidden_states(part, [len(part)]) for part in ids.split(whole)]
        shared = torch.cat([ids[:prefix], *(part[prefix:] for part in ids.split(whole))])
        expected = torch.cat([alone[0][:prefix], *(part[prefix:] for part in alone)])
        assert_alike(model.hidden_states(shared, lengths, shared=prefix), expected, SMALL_DECODER + LONGEST)

    def test_long_sequences_take_another_way_to_the_same_numbers(self) -> None:
        model = small_decoder()
        ids, _, whole = with_prefix(400, [500, 20])
        shared = torch.cat([ids[: whole[0]], ids[-20:]])
        found = model.hidden_states(shared, [500, 20], shared=400)
        assert_alike(found[: whole[0]], model.hidden_states(ids[: whole[0]], whole[:1]), SMALL_DECODER + 2 * 900)

    def test_loss_and_gradient_are_those_of_the_whole_sequences(self, model: Decoder) -> None:
        torch.manual_seed(0)
        add_adapter(model, LoraConfig(r=2, init_lora_weights=False))
        parameters = [p for p in model.parameters() if p.requires_grad]
        ids, targets, lengths = with_prefix(9, [4, 30, 1, 12])
        seen = []
        handle = model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        loss = summed_loss(model, ids, targets, lengths)
        handle.remove()
        assert seen == [len(ids) - 3 * 9]
        together = torch.autograd.grad(loss, parameters)
        losses = [
            summed_loss(model, part, target, [len(part)])
            for part, target in zip(ids.split(lengths), targets.split(lengths), strict=True)
        ]
        assert_alike(loss, torch.stack(losses).sum(), SMALL_DECODER + LONGEST)
        one_by_one = torch.autograd.grad(torch.stack(losses).sum(), parameters)
        assert_gradients_alike(together, one_by_one, 3 * (SMALL_DECODER + LONGEST) + len(ids))

    @pytest.mark.parametrize("trained_from", [0, 4, 9])
    def test_a_token_that_is_trained_is_not_shared(self, trained_from: int) -> None:
        model = small_decoder()
        ids, targets, lengths = with_prefix(9, [4, 30, 12])
        targets[lengths[0] + trained_from] = 3
        loss = summed_loss(model, ids, targets, lengths)
        losses = [
            summed_loss(model, part, target, [len(part)])
            for part, target in zip(ids.split(lengths), targets.split(lengths), strict=True)
        ]
        assert_alike(loss, torch.stack(losses).sum(), SMALL_DECODER + LONGEST)


class TestCache:
    def test_step_by_step_is_the_whole_sequence(self, model: Decoder) -> None:
        ids = some_ids(2, 10)
        cache = new_cache(model, [0, 0])
        steps = [model.hidden_states(part, cache=cache) for part in ids.split([4, 1, 1, 3, 1], dim=1)]
        assert_alike(torch.cat(steps, dim=1), model.hidden_states(ids), SMALL_DECODER + LONGEST)
        assert cache.length == 10

    def test_left_padding_changes_nothing(self, model: Decoder) -> None:
        prompts = [some_ids(n, seed=n) for n in (7, 4, 1)]
        padded = torch.stack([torch.cat([torch.zeros(7 - len(p), dtype=torch.int64), p]) for p in prompts])
        cache = new_cache(model, [7 - len(p) for p in prompts])
        last = model.hidden_states(padded, cache=cache)[:, -1]
        more = some_ids(3, 2, seed=9)
        steps = [last, *(model.hidden_states(more[:, i : i + 1], cache=cache)[:, 0] for i in range(2))]
        for row, prompt in enumerate(prompts):
            alone = model.hidden_states(torch.cat([prompt, more[row]])[None])[0, -3:]
            assert_alike(torch.stack([step[row] for step in steps]), alone, SMALL_DECODER + LONGEST)

    def test_a_shared_prefix_is_computed_once(self, model: Decoder) -> None:
        prefix, rests = some_ids(5), [some_ids(n, seed=n) for n in (4, 2)]
        single = new_cache(model, [0])
        model.hidden_states(prefix[None], cache=single)
        cache = new_cache(model, [0, 2], prefix=single)
        padded = torch.stack([rests[0], torch.cat([torch.zeros(2, dtype=torch.int64), rests[1]])])
        last = model.hidden_states(padded, cache=cache)[:, -1]
        for row, rest in enumerate(rests):
            alone = model.hidden_states(torch.cat([prefix, rest])[None])[0, -1]
            assert_alike(last[row], alone, SMALL_DECODER + LONGEST)

    def test_more_than_the_context_is_refused(self) -> None:
        model = small_decoder(max_position_embeddings=8)
        cache = new_cache(model, [0])
        model.hidden_states(some_ids(1, 8), cache=cache)
        with pytest.raises(ShapeError, match="a sequence of 9 tokens exceeds the model's 8-token context"):
            model.hidden_states(some_ids(1, 1), cache=cache)


class TestHead:
    def test_a_tied_head_is_the_embedding(self) -> None:
        model = small_decoder(tie_word_embeddings=True)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.bfloat16()
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_an_untied_head_is_not(self) -> None:
        model = small_decoder()
        assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()

    def test_it_is_what_all_linear_leaves_out(self) -> None:
        model = small_decoder()
        assert model.get_output_embeddings() is model.lm_head
        assert "lm_head" not in add_adapter(model, LoraConfig(r=1)).modules


class TestWrongInput:
    @pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0), (5,), (1, 2, 3)])
    def test_shapes(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ShapeError, match=r"input_ids must be \(batch, seq\)"):
            small_decoder()(torch.zeros(shape, dtype=torch.int64))

    @pytest.mark.parametrize("lengths", [[], [3], [5, 1], [5, 0], [6, -1], [2, 2]])
    def test_lengths_that_do_not_add_up(self, lengths: list[int]) -> None:
        with pytest.raises(ShapeError, match="packed input_ids must be"):
            small_decoder().hidden_states(some_ids(5), lengths)

    def test_no_packed_sequence_at_all(self) -> None:
        with pytest.raises(ShapeError):
            small_decoder().hidden_states(some_ids(0), [])

    @pytest.mark.parametrize("bad", [-1, -100, VOCABULARY, VOCABULARY + 5])
    def test_a_token_id_outside_the_vocabulary(self, bad: int) -> None:
        ids = some_ids(1, 4)
        ids[0, 2] = bad
        with pytest.raises(ShapeError, match=f"token id {bad} is outside the vocabulary of {VOCABULARY}"):
            small_decoder()(ids)

    @pytest.mark.parametrize("lengths", [None, [17], [3, 17]])
    def test_a_sequence_longer_than_the_context(self, lengths: list[int] | None) -> None:
        model = small_decoder(max_position_embeddings=16)
        ids = some_ids(1, 17) if lengths is None else some_ids(sum(lengths))
        with pytest.raises(ShapeError, match="a sequence of 17 tokens exceeds the model's 16-token context"):
            model.hidden_states(ids, lengths)
        model.hidden_states(some_ids(32), [16, 16])  # each within it

    def test_a_sequence_longer_than_the_sliding_window(self) -> None:
        model = small_decoder(architectures=["MistralForCausalLM"], sliding_window=8)
        model(some_ids(1, 8))
        with pytest.raises(ShapeError, match="9 tokens exceeds the model's 8-token sliding window"):
            model(some_ids(1, 9))


def test_bfloat16_keeps_exact_frequencies() -> None:
    model = small_decoder().double()
    ids = some_ids(1, 600)
    exact = model(ids)
    rounded = model.bfloat16()(ids).double()
    assert rounded.dtype == torch.float64 and model.dtype == torch.bfloat16
    error = (rounded - exact).abs().mean(dim=(0, 2))
    assert error[-100:].mean() < 2 * error[:100].mean()  # positions rounded to bf16 would be lost beyond 256


@pytest.mark.parametrize("changes", [{"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"rope_theta": 100.0}])
def test_rope_settings_reach_the_model(changes: dict[str, Any]) -> None:
    ids = some_ids(1, 12)
    assert not torch.allclose(small_decoder(**changes)(ids), small_decoder()(ids))


def test_a_config_builds_the_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Decoder(DecoderConfig.from_dict(small_config()))
    assert model.device.type == "meta"
