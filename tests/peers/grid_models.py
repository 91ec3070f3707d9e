"""Small random models for the grid of adapters: Llama, Qwen2 with biases, GPT-2 with Conv1D, a mixture, a conv net."""

from __future__ import annotations

import importlib
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.models import Decoder, DecoderConfig

VOCABULARY = 48
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class ConvNet(nn.Module):
    """Convolutions of one and two dimensions with stride, padding and dilation, norms and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.blocks = nn.ModuleList([nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.Conv2d(6, 8, 1)])
        self.line = nn.Conv1d(8, 5, 3, padding=2)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        for block in self.blocks:
            x = block(x).relu()
        return cast(Tensor, self.head(self.line(x.flatten(2)).relu().mean(-1)))


class Experts(nn.Module):
    """Two parameters of three dimensions, in either order of dimensions, as mixtures of experts keep them."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = ((3, 8, 10), (3, 10, 8)) if is_transposed else ((3, 10, 8), (3, 8, 10))
        self.up_proj, self.down_proj = nn.Parameter(torch.randn(up) / 3), nn.Parameter(torch.randn(down) / 3)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        return ((x @ up).relu() @ down).mean(0)


class Mixture(nn.Module):
    """A layer, two layers of experts, a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": Experts(flag)}) for flag in (False, True))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + cast(Any, layer)["experts"](x)
        return cast(Tensor, self.last(x))


def build(kind: str) -> nn.Module:
    """Return a model of one kind, always with the same weights, in eval mode and frozen."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    if kind in ("llama", "llama-tied"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(tie_word_embeddings=kind == "llama-tied", **_SIZES)
        )
    elif kind == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(tie_word_embeddings=False, **_SIZES))
    elif kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    else:
        model = {"conv": ConvNet, "mixture": Mixture}[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms are all one and biases all zero: give each its own values
                parameter.add_(torch.randn_like(parameter) / 10)
            elif hasattr(model, "config"):
                parameter.mul_(4)  # of deviation 0.02, which would leave nothing of an update's effect
            assert name
    return cast(nn.Module, model.eval().requires_grad_(False))


def as_decoder(model: nn.Module) -> Decoder:
    """Return our decoder with the weights of a Llama or a Qwen2."""
    config = cast(Any, model.config).to_dict() | {"architectures": [type(model).__name__]}
    decoder = Decoder(DecoderConfig.from_dict(config))
    decoder.load_state_dict(model.state_dict())
    return decoder.eval().requires_grad_(False)


def inputs(kind: str) -> Tensor:
    """Return an input of the model."""
    draw = torch.Generator().manual_seed(1)
    if kind == "conv":
        return torch.randn(2, 3, 9, 9, generator=draw)
    if kind == "mixture":
        return torch.randn(5, 6, generator=draw)
    return torch.randint(VOCABULARY, (2, 7), generator=draw)
