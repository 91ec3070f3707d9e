"""Embeddings whose forward does more than a lookup: they scale or norm the rows, shift the ids, or take no ids."""

import copy
from typing import Any

import pytest
import torch
from tolerances import assert_alike
from torch import Tensor, nn

from lorakit import LoraConfig, add_adapter, disable_adapters, merge_adapter, use_rows
from lorakit.errors import AdapterError
from lorakit.layers import LoRAEmbedding

TERMS = 64  # roundings of a lookup of rank 3, its scale and its norm
IDS = torch.tensor([[1, 5, 9, 1], [3, 2, 0, 7]])


class ByNumber(nn.Embedding):
    """Scales the rows by a number, as BART does."""

    embed_scale = 4.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class ByTensor(nn.Embedding):
    """Scales the rows by a tensor, as Gemma does."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("embed_scale", torch.tensor(4.0), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


class Positions(nn.Embedding):
    """Looks up positions after an offset, whatever the ids are."""

    def forward(self, input_ids: Tensor, past: int = 0, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(past, past + input_ids.shape[1]).expand(len(input_ids), -1)
        return super().forward(position_ids + 2)


class Sliced(nn.Embedding):
    """Takes a slice of the table instead of a lookup, as Whisper does."""

    def forward(self, input_ids: Tensor, past: int = 0) -> Tensor:
        return self.weight[past : past + input_ids.shape[1]]


class Normed(nn.Embedding):
    """Norms the rows."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.layer_norm(super().forward(input), (self.embedding_dim,))


class WithOneRow(nn.Embedding):
    """Puts a row of its own where an id stands."""

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input) * 4
        rows[input == 5] = 1.0
        return rows


class Mixed(nn.Embedding):
    """Takes ids, or probabilities of ids."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight if input.is_floating_point() else super().forward(input)


class Pair(nn.Embedding):
    """Returns the ids too."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(input), input


KINDS: list[type[nn.Embedding]] = [nn.Embedding, ByNumber, ByTensor, Positions, Sliced, Normed, WithOneRow, Mixed, Pair]
VARIANTS = [{}, {"use_dora": True}, {"variant": "hira"}, {"init_lora_weights": "pissa"}]


def adapted(kind: type[nn.Embedding], **settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(kind(12, 8)).requires_grad_(False)
    add_adapter(model, LoraConfig(r=3, target_modules=["0"], **settings))
    for parameter in model[0].parameters_of("default").values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def dense(model: nn.Sequential) -> nn.Embedding:
    """Return the base layer with the update in its table."""
    table: nn.Embedding = copy.deepcopy(model[0].base_layer)
    table.weight.data += model[0].delta_weight("default")
    return table


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_that_of_the_updated_table(
    kind: type[nn.Embedding], settings: dict[str, Any], dtype: torch.dtype
) -> None:
    model = adapted(kind, **settings).to(dtype)
    found, expected = model(IDS), dense(model)(IDS)
    assert isinstance(model[0], LoRAEmbedding)
    if kind is Pair:
        (found, ids), (expected, _) = found, expected
        assert ids is IDS
    assert_alike(found, expected, TERMS, stores=16)  # of A, B, their product, two starts, the sum and its scale
    found.float().square().sum().backward()
    assert all(parameter.grad.any() for parameter in model[0].parameters_of("default").values())
    with disable_adapters(model):
        alone = model(IDS)
    assert torch.equal(
        alone[0] if kind is Pair else alone, (model[0].base_layer(IDS)[0] if kind is Pair else model[0].base_layer(IDS))
    )


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_merged_table_gives_the_same(kind: type[nn.Embedding]) -> None:
    model = adapted(kind)
    expected = model(IDS)
    merge_adapter(model)
    assert type(model[0]) is kind
    assert_alike(model(IDS), expected, TERMS)


def test_further_arguments_and_names() -> None:
    model = adapted(Positions)
    table = dense(model)
    assert_alike(model[0](IDS, 3), table(IDS, 3), TERMS)
    assert_alike(model[0](input_ids=IDS, past=1), table(IDS, 1), TERMS)
    assert_alike(model[0](IDS, position_ids=IDS), table(IDS, position_ids=IDS), TERMS)
    assert_alike(adapted(Mixed)[0](torch.eye(12)), dense(adapted(Mixed)).weight, TERMS)


def test_hook_on_the_base_table() -> None:
    for kind in (nn.Embedding, ByNumber):
        model = adapted(kind)
        expected = model(IDS) + 100
        model[0].base_layer.register_forward_hook(lambda module, inputs, output: output + 100)
        assert_alike(model(IDS), expected, TERMS)


@pytest.mark.parametrize("kind", [ByNumber, Positions, Normed, Sliced, Pair])
def test_rows_with_adapters_of_their_own(kind: type[nn.Embedding]) -> None:
    model = adapted(kind)
    with disable_adapters(model):
        alone = model(IDS)
    expected = model(IDS)
    with use_rows(model, ["default", "__base__"]):
        if kind in (Sliced, Pair):
            with pytest.raises(AdapterError, match="its output has no rows"):
                model(IDS)
        else:
            assert_alike(model(IDS), torch.stack([expected[0], alone[1]]), TERMS)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_tokens(kind: type[nn.Embedding]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(12, 8)).requires_grad_(False)
    add_adapter(model, LoraConfig(target_modules=[], trainable_token_indices={"0": [1, 3]}))
    alone = model(IDS)
    expected = copy.deepcopy(model[0].base_layer)
    before = copy.deepcopy(expected)(IDS)
    rows = model[0].parameters_of("default")["trainable_tokens_delta"]
    rows.data = torch.randn(2, 8)
    expected.weight.data[[1, 3]] = rows.data
    found, wanted = model(IDS), expected(IDS)
    if kind is Pair:
        alone, before, found, wanted = alone[0], before[0], found[0], wanted[0]
    assert torch.equal(alone, before)
    assert_alike(found, wanted, TERMS)
    found.square().sum().backward()
    assert rows.grad is not None and rows.grad.any()


class InEightBits(nn.Embedding):
    """A table in 8 bits, with a scale: its codes are no values."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scale = self.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((self.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float() * self.scale


def test_quantized_table() -> None:
    model = adapted(InEightBits)
    with disable_adapters(model):
        alone = model(IDS)
    assert_alike(model(IDS), alone + model[0].delta_weight("default")[IDS], TERMS)
    with pytest.raises(AdapterError, match="0 is a InEightBits, which keeps its weight in int8"):
        merge_adapter(model)
    tokens = nn.Sequential(InEightBits(12, 8))
    with pytest.raises(AdapterError, match="0 of trainable_token_indices is quantized"):
        add_adapter(tokens, LoraConfig(target_modules=[], trainable_token_indices={"0": [1]}))


def test_compiled_table() -> None:
    for kind in (ByNumber, Positions):
        model = adapted(kind)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_alike(compiled(IDS), model(IDS), TERMS)
