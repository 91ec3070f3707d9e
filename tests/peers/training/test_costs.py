"""What one adapted layer of SmolLM2 costs here and with PEFT, counted: products, and bytes kept for the backward pass.

The figures of both are printed: `pytest tests/peers/training/test_costs.py -s`.
"""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import pytest
import torch
from counting import Costs, adapted_linears, costs
from torch import Tensor, nn

from lorakit import LoraConfig, add_adapter, load_model
from lorakit.layers import rope_frequencies, rope_tables
from lorakit.models.decoder.attention import Layout

peft = importlib.import_module("peft")
transformers = importlib.import_module("transformers")

TOKENS, R = 512, 16


@pytest.fixture(scope="module")
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(TOKENS, 576, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def ours(smollm2_folder: Path, x: Tensor) -> Costs:
    """Of our first layer, in bf16 with fp32 adapters."""
    model = load_model(smollm2_folder, quant_type=None, dtype=torch.bfloat16).train()
    add_adapter(model, LoraConfig(r=R, target_modules="all-linear"))
    layout, config = Layout.packed([TOKENS], torch.device("cpu")), model.config
    rope = rope_tables(rope_frequencies(config.head_dim, config.rope_theta), layout.positions, x.dtype)
    layer, given = model.model.layers[0], x.clone().requires_grad_()
    return costs(layer, lambda: layer(given, layout, rope, None))


@pytest.fixture(scope="module", params=[True, False], ids=["autocast", "no-autocast"])
def theirs(request: pytest.FixtureRequest, smollm2_folder: Path, x: Tensor) -> tuple[Costs, nn.Module]:
    """Of transformers' first layer with PEFT's adapters, in fp32 as by default, or in bf16."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.bfloat16)
    decoder = copy.deepcopy(whole.model)
    config = peft.LoraConfig(r=R, target_modules="all-linear")
    adapted = peft.get_peft_model(decoder, config, autocast_adapter_dtype=request.param).train()
    if not request.param:
        assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16}
    inner = adapted.base_model.model
    given = x.clone()[None].requires_grad_()
    rope = inner.rotary_emb(given, torch.arange(TOKENS)[None])
    layer = inner.layers[0]

    def run() -> Tensor:
        y = layer(given, attention_mask=None, position_embeddings=rope)
        return y if isinstance(y, Tensor) else y[0]

    return costs(layer, run), layer


def test_products(ours: Costs, theirs: tuple[Costs, nn.Module]) -> None:
    """Both do the least there is: PEFT's autograd needs no more of them, and neither has a frozen weight's gradient."""
    of_peft, layer = theirs
    adapters = sum(2 * TOKENS * R * (n + m) for n, m in adapted_linears(layer))
    base = sum(2 * TOKENS * n * m for n, m in adapted_linears(layer))
    for name, found in (("lorakit", ours), ("PEFT", of_peft)):
        print(f"\n{name}: {found.forward / 1e6:,.0f} MFLOP forward, {found.backward / 1e6:,.0f} backward", end="")
        assert (found.forward, found.backward) == (base + adapters, base + 2 * adapters)
        assert len(found.gradients) == 14


def test_bytes_kept_for_the_backward_pass(ours: Costs, theirs: tuple[Costs, nn.Module]) -> None:
    of_peft, _ = theirs
    for name, found in (("lorakit", ours), ("PEFT", of_peft)):
        of_dtypes = ", ".join(f"{n / TOKENS:,.0f} in {str(t).removeprefix('torch.')}" for t, n in found.saved.items())
        print(f"\n{name}: {found.saved_bytes / TOKENS:,.0f} bytes a token and layer; elements: {of_dtypes}", end="")
    assert ours.saved[torch.float32] == 2 * TOKENS  # the norms' 1 / rms; no copy of an activation
    assert of_peft.saved[torch.float32] > 2 * 576 * TOKENS  # of both norms, at the least
    assert ours.saved_bytes < 0.6 * of_peft.saved_bytes
