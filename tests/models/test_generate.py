"""Generation against a loop without a cache: prompts of every kind, batching, stopping, sampling."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
import torch
from made import ARCHITECTURES, CHATML, SPECIAL, make_tokenizer, sentencepiece, small_decoder, small_tokenizer
from tokenizers import processors
from torch import nn

from lorakit import Decoder, LoraConfig, Tokenizer, add_adapter, generate
from lorakit.errors import ConfigError, DataError, LorakitError

PROMPTS = [
    "The quick brown fox",
    "The quick",
    "x",
    "What is the capital of France, and of the lazy dog?",
    "The quick brown dog does not mind",
    "é",
]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def model() -> Decoder:
    return small_decoder()


def greedy_ids(model: Decoder, prompt: list[int], count: int, stops: tuple[int, ...] = ()) -> list[int]:
    """Without a cache, one prompt at a time."""
    ids = list(prompt)
    for _ in range(count):
        token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


def stopping_at(tok: Tokenizer, *eos_ids: int) -> Tokenizer:
    """The same tokenizer with other ends of generation."""
    backend = tokenizers.Tokenizer.from_file(str(tok.folder / "tokenizer.json"))
    return Tokenizer(backend, eos_ids=eos_ids)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_the_loop_without_a_cache(architecture: str, tok: Tokenizer) -> None:
    model = small_decoder(**ARCHITECTURES[architecture])
    expected = [tok.decode(greedy_ids(model, tok.encode(prompt), 6, tok.eos_ids)) for prompt in PROMPTS]
    assert generate(model, tok, PROMPTS, max_new_tokens=6) == expected


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 100])
def test_the_batch_size_changes_nothing(batch_size: int, model: Decoder, tok: Tokenizer) -> None:
    assert generate(model, tok, PROMPTS, 6, batch_size=batch_size) == generate(model, tok, PROMPTS, 6)


def test_a_list_gives_a_list_and_one_gives_a_string(model: Decoder, tok: Tokenizer) -> None:
    one = generate(model, tok, PROMPTS[0], 4)
    assert isinstance(one, str) and one
    assert generate(model, tok, [PROMPTS[0]], 4) == [one]
    assert generate(model, tok, (PROMPTS[0], PROMPTS[1]), 4)[0] == one
    assert generate(model, tok, [], 4) == []


def test_conversations_go_through_the_chat_template(model: Decoder, tok: Tokenizer) -> None:
    chats = [
        [{"role": "user", "content": "fox?"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the dog"}],
    ]
    as_text = [tok.render_chat(chat, add_generation_prompt=True) for chat in chats]
    assert as_text[0].endswith("assistant\n")
    assert generate(model, tok, chats, 5) == generate(model, tok, as_text, 5)
    assert generate(model, tok, chats[0], 5) == generate(model, tok, as_text[0], 5)


@pytest.mark.parametrize("end", ["", " <|im_end|>"])
def test_a_plain_prompt_begins_as_the_post_processor_says(end: str, model: Decoder, tok: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tok.folder / "tokenizer.json"))
    ids = [(token, backend.token_to_id(token)) for token in SPECIAL]
    backend.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A{end}", special_tokens=ids)
    with_bos = Tokenizer(backend, eos_ids=[ids[2][1]], template=tok._template)
    expected = [tok.decode(greedy_ids(model, [ids[0][1], *tok.encode(p)], 6, tok.eos_ids)) for p in [*PROMPTS, ""]]
    assert generate(model, with_bos, [*PROMPTS, ""], 6) == expected
    assert generate(model, with_bos, [SPECIAL[0] + prompt for prompt in PROMPTS], 6) == expected[:-1]
    chat = [{"role": "user", "content": "fox?"}]
    assert generate(model, with_bos, chat, 6) == generate(model, tok, chat, 6)  # its template has no BOS


def writes(model: Decoder, answers: dict[int, list[int]], stop: int) -> Decoder:
    """Make the model answer a prompt that ends in a token with the tokens given for it, then with `stop`."""
    follows = {}
    for last, tokens in answers.items():
        follows |= dict(itertools.pairwise([last, *tokens, stop]))
    vocabulary = model.config.vocab_size
    model.lm_head = nn.Linear(vocabulary, vocabulary, bias=False).requires_grad_(False)
    model.lm_head.weight.zero_()
    for token, following in follows.items():
        model.lm_head.weight[following, token] = 1.0
    model.hidden_states = lambda ids, *_, **__: nn.functional.one_hot(ids, vocabulary).float()  # type: ignore
    return model


@pytest.mark.parametrize("batch_size", [1, 3])
def test_prompt_and_answer_are_the_whole_text(batch_size: int, tmp_path: Path) -> None:
    tok = make_tokenizer(tmp_path, CHATML, SPECIAL, ["<|im_end|>"], sentencepiece)
    x, u, q = (tok.encode(letter)[-1] for letter in "xuq")
    tokens = ["▁", "dog", ",", ".", *(f"<0x{byte:02X}>" for byte in "€".encode())]
    space, dog, comma, dot, *euro = [tok._backend.token_to_id(token) for token in tokens]
    model = writes(small_decoder(vocab_size=700), {x: [space, dog, comma], u: [dot], q: euro}, tok.eos_id)
    prompts = ["x", "u", "q"]
    assert generate(model, tok, prompts, 5, batch_size=batch_size) == [" dog,", ".", "€"]
    assert generate(model, tok, prompts, 2, batch_size=batch_size) == [" dog", ".", "\ufffd\ufffd"]


def test_the_space_that_the_tokenizer_puts_after_a_special_token_is_not_the_answers(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}<|endoftext|>"
    tok = make_tokenizer(tmp_path, template, SPECIAL, ["<|im_end|>"], sentencepiece)
    asks, dog = tok.encode("<|endoftext|>dog")[0], tok.encode("<|endoftext|>dog")[1:]
    model = writes(small_decoder(vocab_size=700), {asks: dog}, tok.eos_id)
    assert generate(model, tok, [{"role": "user", "content": "fox"}], 5) == "dog"


@pytest.mark.parametrize("prefix", ["", "The quick brown fox jumps over the lazy dog."])
def test_prompts_with_a_shared_beginning(prefix: str, model: Decoder, tok: Tokenizer) -> None:
    prompts = [prefix + rest for rest in (" It", " It does so every day", "x", "")] if prefix else ["x", "x", "x y"]
    assert generate(model, tok, prompts, 6) == [generate(model, tok, prompt, 6) for prompt in prompts]


def test_equal_prompts_get_equal_answers(model: Decoder, tok: Tokenizer) -> None:
    assert len(set(generate(model, tok, ["The fox"] * 5, 6))) == 1


def test_an_end_of_turn_stops_its_own_row_and_is_not_in_the_text(model: Decoder, tok: Tokenizer) -> None:
    free = [greedy_ids(model, tok.encode(prompt), 8) for prompt in PROMPTS]
    stop = free[0][3]
    ids = [row[: row.index(stop)] if stop in row else row for row in free]
    assert len({len(row) for row in ids}) > 1
    stopping = stopping_at(tok, stop)
    assert generate(model, stopping, PROMPTS, 8) == [stopping.decode(row) for row in ids]


def test_any_of_several_ends_stops(model: Decoder, tok: Tokenizer) -> None:
    row = greedy_ids(model, tok.encode("x"), 8)
    stopping = stopping_at(tok, 399, row[2])
    assert generate(model, stopping, "x", 8) == stopping.decode(row[: row.index(row[2])])


def test_a_first_token_that_ends_the_turn_leaves_an_empty_answer(model: Decoder, tok: Tokenizer) -> None:
    (first,) = greedy_ids(model, tok.encode("x"), 1)
    assert generate(model, stopping_at(tok, first), "x", 5) == ""


def test_a_padding_token_that_the_model_has_no_row_for_does_not_matter(tok: Tokenizer) -> None:
    model = small_decoder(vocab_size=388)
    backend = tokenizers.Tokenizer.from_file(str(tok.folder / "tokenizer.json"))
    padded = Tokenizer(backend, eos_ids=[387], special_tokens={"pad_token": backend.id_to_token(388)})
    assert padded.pad_id == 388
    assert generate(model, padded, PROMPTS[:3], 4) == [generate(model, padded, prompt, 4) for prompt in PROMPTS[:3]]


class TestSampling:
    def test_a_seed_repeats_and_another_does_not(self, model: Decoder, tok: Tokenizer) -> None:
        first, again, other = (generate(model, tok, PROMPTS, 8, temperature=1.0, seed=seed) for seed in (1, 1, 2))
        assert first == again != other

    def test_the_global_generator_is_neither_used_nor_moved(self, model: Decoder, tok: Tokenizer) -> None:
        torch.manual_seed(5)
        before = torch.get_rng_state()
        generate(model, tok, "x", 4, temperature=1.0)
        assert torch.equal(torch.get_rng_state(), before)

    def test_cold_or_narrow_sampling_is_greedy(self, model: Decoder, tok: Tokenizer) -> None:
        greedy = generate(model, tok, PROMPTS, 5)
        assert generate(model, tok, PROMPTS, 5, temperature=1e-4, seed=0) == greedy
        assert generate(model, tok, PROMPTS, 5, temperature=1.0, top_p=1e-6, seed=0) == greedy

    def test_frequencies_are_the_softmax(self, model: Decoder, tok: Tokenizer) -> None:
        model.lm_head.weight.data *= 12  # a few tokens take most of the probability
        probs = (model(torch.tensor([tok.encode("x")]))[0, -1] / 2).softmax(dim=-1)
        top = probs.argmax()
        drawn = Counter(generate(model, tok, ["x"] * 2000, 1, temperature=2.0, seed=0, batch_size=500))
        share = drawn[tok.decode([int(top)])] / 2000
        assert 0.05 < probs[top] < 0.95
        assert abs(share - float(probs[top])) < 5 * float((probs[top] * (1 - probs[top]) / 2000).sqrt())

    @pytest.mark.parametrize("values", [{"temperature": 1e-40}, {"temperature": 5e-324}, {"top_p": 1e-300}], ids=str)
    def test_the_coldest_and_narrowest_sampling_is_greedy(
        self, values: dict[str, float], model: Decoder, tok: Tokenizer
    ) -> None:
        greedy = generate(model, tok, PROMPTS, 5)
        assert generate(model, tok, PROMPTS, 5, **{"temperature": 1.0, **values}, seed=0) == greedy

    def test_top_p_draws_from_the_smallest_set_that_reaches_it(self, model: Decoder, tok: Tokenizer) -> None:
        model.lm_head.weight.data *= 4
        probs, order = model(torch.tensor([tok.encode("x")]))[0, -1].softmax(dim=-1).sort(descending=True)
        kept = int((probs.cumsum(0) < 0.6).sum()) + 1
        drawn = generate(model, tok, ["x"] * 600, 1, temperature=1.0, top_p=0.6, seed=0, batch_size=200)
        assert 1 < kept < 50
        assert set(drawn) <= {tok.decode([token]) for token in order[:kept].tolist()}


class TestWrongInput:
    def test_an_empty_prompt(self, model: Decoder, tok: Tokenizer) -> None:
        for prompts, index in (("", 0), (["x", ""], 1)):
            with pytest.raises(DataError, match=f"prompt {index} has 0 tokens; expected 1 to"):
                generate(model, tok, prompts)

    def test_an_empty_conversation(self, model: Decoder, tok: Tokenizer) -> None:
        with pytest.raises(DataError):
            generate(model, tok, [[]])

    @pytest.mark.parametrize("limit", [{"max_position_embeddings": 16}, {"sliding_window": 16}])
    def test_no_room_in_the_context(self, limit: dict[str, int], tok: Tokenizer) -> None:
        model = small_decoder(architectures=["MistralForCausalLM"], **limit)
        prompt = "a" * 10
        assert len(tok.encode(prompt)) == 10
        generate(model, tok, prompt, 6)
        with pytest.raises(DataError, match=r"prompt 0 has 10 tokens; expected 1 to 9, .* 7 more .* context of 16"):
            generate(model, tok, prompt, 7)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"max_new_tokens": 0},
            {"max_new_tokens": -1},
            {"batch_size": 0},
            {"temperature": -0.1},
            {"temperature": 1.0, "seed": 2**64},
            {"temperature": 1.0, "seed": -(2**63) - 1},
            {"temperature": float("nan")},
            {"temperature": float("inf")},
            {"temperature": 1.0, "top_p": 0.0},
            {"top_p": 1.5},
        ],
    )
    def test_numbers_out_of_range(self, wrong: dict[str, float], model: Decoder, tok: Tokenizer) -> None:
        with pytest.raises(ConfigError, match=next(reversed(wrong))):
            generate(model, tok, "x", **wrong)


class TestSideEffects:
    def test_a_trained_copy_of_the_norm_leaves_the_dtype(self, tok: Tokenizer) -> None:
        model = small_decoder().bfloat16()
        plain = generate(model, tok, PROMPTS, 6)
        add_adapter(model, LoraConfig(r=2, modules_to_save=["norm"]))
        assert model.dtype == torch.bfloat16  # the copy is in fp32
        assert generate(model, tok, PROMPTS, 6) == plain

    @pytest.mark.parametrize("training", [True, False])
    def test_the_mode_is_restored(self, training: bool, model: Decoder, tok: Tokenizer) -> None:
        model.train(training)
        generate(model, tok, "x", 2)
        assert model.training is training

    def test_also_after_an_error(self, tok: Tokenizer) -> None:
        model = small_decoder(vocab_size=4).train()
        with pytest.raises(LorakitError, match="outside the vocabulary"):
            generate(model, tok, "fox", 2)
        assert model.training and all(module.training for module in model.modules())

    def test_dropout_is_off_and_training_can_go_on(self, model: Decoder, tok: Tokenizer) -> None:
        add_adapter(model, LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False))
        model.train()
        assert generate(model, tok, "The fox", 6) == generate(model, tok, "The fox", 6)
        model(torch.tensor([[1, 2]])).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    def test_no_weight_changes(self, model: Decoder, tok: Tokenizer) -> None:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        generate(model, tok, PROMPTS, 3)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_an_adapted_head_generates_too(self, model: Decoder, tok: Tokenizer) -> None:
        plain = generate(model, tok, "The fox", 6)
        add_adapter(model, LoraConfig(r=2, target_modules=["lm_head"]))
        assert not isinstance(model.lm_head, nn.Linear)
        assert generate(model, tok, "The fox", 6) == plain
