"""`TrainConfig.compile`: the same losses and gradients, compiled once for all layers and lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from made import ARCHITECTURES, small_decoder
from tolerances import SMALL_DECODER, assert_alike, assert_gradients_alike
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lorakit import Decoder, LoraConfig, adapter_parameters, add_adapter
from lorakit.errors import ConfigError, TrainingError
from lorakit.layers import Linear4bit
from lorakit.models.decoder import compiled
from lorakit.models.decoder.loss import summed_loss
from lorakit.training.activations import saving_activations
from lorakit.training.compiling import compiled_layers

LENGTHS = ([20, 20], [32, 9, 8], [23, 23, 24], [70], [130, 11], [17, 18])


@pytest.fixture(autouse=True)
def from_scratch() -> Iterator[None]:
    torch._dynamo.reset()
    compiled.compiled.cache_clear()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_generated_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graphs, traced and guarded, whose operations PyTorch runs one by one: that takes no C++ compiler."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_(function, backend="aot_eager", **how))


def decoder(lora: LoraConfig, layers: int = 2, **changes: Any) -> Decoder:
    """Return a decoder with 4-bit layers and an adapter that has been trained, in train mode."""
    model = small_decoder(num_hidden_layers=layers, **changes)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Linear4bit.from_linear(module))
    add_adapter(model, lora)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(model):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def loss_and_gradients(model: Decoder, lengths: list[int]) -> tuple[Tensor, list[Tensor]]:
    ids = torch.randint(model.config.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(len(lengths)))
    loss = summed_loss(model, ids, ids.roll(-1), lengths)
    return loss.detach(), list(torch.autograd.grad(loss, adapter_parameters(model)))


def check_step(model: Decoder, lengths: list[int]) -> None:
    """Compare a compiled step with the eager one."""
    wanted_loss, wanted = loss_and_gradients(model, lengths)
    with compiled_layers(model, True):
        loss, gradients = loss_and_gradients(model, lengths)
    # Up to four layers, once forward and twice as much backward, and the tokens that a gradient adds up.
    assert_alike(loss, wanted_loss, 2 * SMALL_DECODER)
    assert_gradients_alike(gradients, wanted, 3 * 2 * SMALL_DECODER + sum(lengths))


@pytest.mark.usefixtures("without_generated_code")
def test_one_compilation_serves_all_layers_and_lengths() -> None:
    model, made = decoder(LoraConfig(r=4), layers=3), []
    for lengths in LENGTHS:
        check_step(model, lengths)
        made.append(counters["stats"]["unique_graphs"])
    assert made[0] == 4  # two parts, of the first layer, whose input has no gradient, and of all the others
    assert made[-1] <= 6 and made[2:] == [made[2]] * 4  # at most one more time, and never after three lengths
    assert not counters["graph_break"]


@pytest.mark.usefixtures("without_generated_code")
@pytest.mark.parametrize(
    ("adapter", "checkpointing"), [({"use_dora": True}, "layer"), ({"target_modules": ["q_proj", "down_proj"]}, "mlp")]
)
def test_with_checkpointing(adapter: Any, checkpointing: Any) -> None:
    model = decoder(LoraConfig(**{"r": 4, **adapter}), **ARCHITECTURES["qwen3"])
    with saving_activations(model, checkpointing):
        check_step(model, LENGTHS[0])
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]


def test_generated_code_computes_the_same() -> None:
    model = decoder(LoraConfig(r=4), layers=1)
    check_step(model, LENGTHS[0])
    assert counters["stats"]["unique_graphs"] == 2 and not model.model.layers[0].is_compiled


def test_where_nothing_can_be_compiled_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(LoraConfig(r=4))
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with (
        pytest.raises(ConfigError, match="needs a C\\+\\+ compiler, but there is no 'no-such-compiler -O2'"),
        compiled_layers(model, True),
    ):
        pass
    with (
        pytest.raises(TrainingError, match="compile knows the layers of a Decoder"),
        compiled_layers(nn.Linear(2, 2), True),
    ):
        pass
