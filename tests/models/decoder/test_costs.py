"""What training a decoder layer and the head costs, counted: products, and what waits for the backward pass."""

from __future__ import annotations

import pytest
import torch
from counting import adapted_linears, costs
from made import ARCHITECTURES, small_decoder
from torch import Tensor, nn

from lorakit import Decoder, LoraConfig, add_adapter
from lorakit.layers import Linear4bit, linear_cross_entropy, linear_together, rope_frequencies, rope_tables
from lorakit.models.decoder.attention import Layout

TOKENS, R = 40, 4


def one_layer(
    architecture: str = "llama", quantized: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Decoder, nn.Module, Tensor, tuple[Layout, tuple[Tensor, Tensor]]]:
    """Return a model, its layer with adapters on all linear layers, an input that wants a gradient, and the rest."""
    model = small_decoder(num_hidden_layers=1, **ARCHITECTURES[architecture]).to(dtype)
    if quantized:
        for part in (model.model.layers[0].self_attn, model.model.layers[0].mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(part, name, Linear4bit.from_linear(module))
    add_adapter(model, LoraConfig(r=R, init_lora_weights=False))
    layout, config = Layout.packed([TOKENS], torch.device("cpu")), model.config
    rope = rope_tables(rope_frequencies(config.head_dim, config.rope_theta), layout.positions, dtype)
    x = torch.randn(TOKENS, config.hidden_size, dtype=dtype, requires_grad=True)
    return model.train(), model.model.layers[0], x, (layout, rope)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("quantized", [False, True])
def test_a_layers_products(architecture: str, quantized: bool) -> None:
    """Backward: dx through each frozen weight and 4·N·r·(in + out) for each adapter; no gradient of a frozen weight."""
    _, layer, x, rest = one_layer(architecture, quantized)
    found = costs(layer, lambda: layer(x, *rest, None))
    sizes = list(adapted_linears(layer))
    assert len(sizes) == 7
    base = sum(2 * TOKENS * n * m for n, m in sizes)
    adapters = sum(2 * TOKENS * R * (n + m) for n, m in sizes)
    assert found.forward == base + adapters
    assert found.backward == base + 2 * adapters
    assert len(found.gradients) == 14 and all("lora_" in name for name in found.gradients)


def test_nothing_is_multiplied_for_an_x_that_wants_no_gradient() -> None:
    _, layer, *_ = one_layer()
    mlp = layer.mlp
    found = costs(mlp, lambda: linear_together(torch.randn(TOKENS, 32), mlp.gate_proj, mlp.up_proj))
    assert found.backward == 2 * (4 * TOKENS * R * (32 + 48) - 2 * TOKENS * R * 32)  # no t A


@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",)])
@pytest.mark.parametrize("quantized", [False, True])
def test_layers_that_read_one_x_keep_it_once(names: tuple[str, ...], quantized: bool) -> None:
    _, layer, *_ = one_layer(quantized=quantized, dtype=torch.bfloat16)
    part = layer.self_attn if names[0] == "q_proj" else layer.mlp
    layers = [getattr(part, name) for name in names]
    x = torch.randn(TOKENS, layers[0].in_features, dtype=torch.bfloat16, requires_grad=True)
    found = costs(part, lambda: linear_together(x, *layers))
    assert found.saved == {torch.bfloat16: x.numel() + len(names) * TOKENS * R}


@pytest.mark.parametrize("quantized", [False, True])
def test_a_layer_keeps_nothing_twice_and_no_fp32_copy(quantized: bool) -> None:
    """The inputs of both norms, the rotated q and k, v, what attention gave, gate, up, and u = x Aᵀ of each adapter."""
    model, layer, x, (layout, rope) = one_layer(quantized=quantized, dtype=torch.bfloat16)
    hidden, heads, kv_heads, dim = 32, 4, 2, model.config.head_dim
    expected = 2 * hidden + (heads + 2 * kv_heads) * dim + heads * dim + 2 * 48 + 7 * R + 2 * dim  # cos and sin, once
    found = costs(layer, lambda: layer(x, layout, rope, None))
    assert found.saved == {torch.bfloat16: TOKENS * expected, torch.float32: 2 * TOKENS}  # the norms' 1 / rms


def test_the_frozen_head_is_multiplied_with_trained_rows_alone_and_gets_no_gradient() -> None:
    head, hidden = nn.Linear(32, 400, bias=False).requires_grad_(False), torch.randn(TOKENS, 32, requires_grad=True)
    trained = torch.arange(TOKENS) % 3 == 0
    targets = torch.arange(TOKENS)[trained]
    found = costs(head, lambda: linear_cross_entropy(hidden[trained], head.weight, targets))
    assert found.forward == 2 * (2 * len(targets) * 32 * 400)  # logits, and their gradient times W, at once
    assert found.backward == 0 and found.gradients == {}
    assert found.saved[torch.float32] == len(targets) * 32  # the gradient of the trained rows; no logits
