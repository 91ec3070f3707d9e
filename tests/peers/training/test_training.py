"""`lorakit.train` against a loop written out with PEFT: the same losses, gradients and steps, on the same batches.

In fp32, where rounding is all that may differ. Our side runs padding-free and, in one case, in several micro-batches;
theirs runs one padded batch a step, and starts each step from our matrices: Adam would make a whole step of what is
nothing but rounding, and two runs would part.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import SMOLLM2, assert_within, rounding, unit
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lorakit import (
    Decoder,
    LoraConfig,
    Record,
    Tokenizer,
    TrainConfig,
    adapter_parameters,
    add_adapter,
    load_model,
    save_adapter,
    train,
)
from lorakit.data import Example, Message, batch_order, encode_records
from lorakit.layers import Linear4bit
from lorakit.training.schedule import learning_rate

peft = importlib.import_module("peft")

Fresh = Callable[[nn.Module], nn.Module]
STEPS = 20
# How far a loss, and a gradient of them all, may be between two runs through the model; backward is twice forward.
OF_LOSS = 2 * float(rounding(SMOLLM2, 1.0))
OF_GRADIENTS = 2 * float(rounding(3 * SMOLLM2, 1.0))
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


@pytest.fixture(scope="module")
def short_records(records: list[Record], tok: Tokenizer) -> list[Record]:
    """The 41 shortest, their instructions left out: ten full steps and one of a single record an epoch."""
    bare = [Record((Message("system", ""), *record.messages[1:]), record.source) for record in records]
    size = {e.source: len(e.input_ids) for e in encode_records(tok, bare, max_length=1024)}
    return sorted(bare, key=lambda record: size[record.source])[:41]


@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_losses(
    quant_type: str | None, our_model: Decoder, their_model: nn.Module, fresh: Fresh, smollm2_folder: Path,
    tok: Tokenizer, short_records: list[Record], tmp_path: Path,
) -> None:  # fmt: skip
    ours, theirs = fresh(our_model), fresh(their_model)
    if quant_type:
        ours = load_model(smollm2_folder, quant_type, dtype=torch.float32)
        put_dequantized(ours, theirs)
    torch.manual_seed(0)
    add_adapter(ours, LORA)
    start = peft.PeftModel.from_pretrained(theirs, save_adapter(ours, tmp_path / "start"), is_trainable=True)

    budget = 2048 if quant_type else 100
    config = TrainConfig(
        lr=1e-3, max_steps=STEPS, batch_size=4, micro_batch_tokens=budget, warmup_ratio=0.1, weight_decay=0.01, seed=3,
        progress=False,
    )  # fmt: skip
    steps: list[tuple[list[Tensor], list[Tensor]]] = []  # the matrices and, clipped, their gradients

    def record(*_: object) -> None:
        steps.append(([p.detach().clone() for p in parameters], [p.grad.clone() for p in parameters]))

    parameters = adapter_parameters(ours)
    hook = register_optimizer_step_pre_hook(record)
    history = train(ours, tok, short_records, config).history
    hook.remove()
    losses = [row["loss"] for row in history]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])  # it learns, so that there is something to compare
    steps.append(([p.detach() for p in parameters], []))
    in_order = {name.replace("base_model.model.", "").replace(".weight", ""): p for name, p in start.named_parameters()}
    theirs_of = [in_order[name] for name, p in ours.named_parameters() if p.requires_grad]
    examples = encode_records(tok, short_records, config.max_length)
    follow_with_peft(start, theirs_of, examples, config, history, steps)


def test_a_transformers_model_trains_as_ours_does(
    our_model: Decoder, their_model: nn.Module, fresh: Fresh, tok: Tokenizer, short_records: list[Record]
) -> None:
    # With a large eps a step is in proportion to the gradient.
    config = TrainConfig(lr=1e-3, eps=1.0, batch_size=3, max_steps=3, progress=False)
    rows = []
    for model in (fresh(our_model), fresh(their_model)):
        torch.manual_seed(1)
        add_adapter(model, LORA)
        rows.append(train(model, tok, short_records[:9], config).history)
    for key, bound in (("loss", OF_LOSS), ("grad_norm", OF_GRADIENTS)):
        assert [row[key] for row in rows[0]] == pytest.approx([row[key] for row in rows[1]], rel=bound)


def follow_with_peft(
    model: nn.Module, parameters: list[nn.Parameter], examples: Sequence[Example], config: TrainConfig,
    history: list[dict[str, Any]], steps: list[tuple[list[Tensor], list[Tensor]]],
) -> None:  # fmt: skip
    """Take each step as our docs say we do, from the same matrices; compare loss, gradient and what becomes of them."""
    model.train()
    optimizer = torch.optim.AdamW(parameters, eps=config.eps, weight_decay=config.weight_decay)
    epochs = (batch_order(len(examples), config.batch_size, config.seed, epoch) for epoch in range(STEPS))
    batches = [batch for epoch in epochs for batch in epoch][:STEPS]
    for step, batch in enumerate(batches):
        lr = learning_rate(step, STEPS, config.lr, config.warmup_ratio, config.min_lr_ratio)
        optimizer.param_groups[0]["lr"] = lr
        (before, gradients), (after, _) = steps[step : step + 2]
        put(parameters, before)
        loss = padded_loss(model, [examples[i] for i in batch])
        optimizer.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
        assert history[step]["loss"] == pytest.approx(loss.item(), rel=OF_LOSS)
        assert history[step]["grad_norm"] == pytest.approx(norm, rel=OF_GRADIENTS)
        ours, theirs = (torch.cat([g.flatten() for g in side]) for side in (gradients, [p.grad for p in parameters]))
        assert (ours - theirs).norm() <= OF_GRADIENTS * theirs.norm()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        # A step rounds the parameter three times and the update, at most sqrt(10) of the learning rate, sixteen times;
        # the moments are those of all steps so far.
        for parameter, expected in zip(parameters, after, strict=True):
            update = 10**0.5 * lr
            bound = unit(torch.float32) * (3 * (expected.abs() + update) + (16 + 4 * (step + 1)) * update)
            assert_within(parameter, expected, 2 * bound)


@torch.no_grad()
def put(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def padded_loss(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Return the mean loss of the trained tokens of one right-padded batch, (batch, longest)."""
    ids = pad_sequence([torch.tensor(example.input_ids) for example in examples], batch_first=True)
    trained = pad_sequence([torch.tensor(example.loss_mask) for example in examples], batch_first=True)
    real = pad_sequence([torch.ones(len(example.input_ids)) for example in examples], batch_first=True)
    logits = model(input_ids=ids, attention_mask=real).logits[:, :-1]
    return cross_entropy(logits[trained[:, 1:]], ids[:, 1:][trained[:, 1:]])


def put_dequantized(quantized: Decoder, dense: nn.Module) -> None:
    """Give the linear layers of `dense` the values that those of `quantized` compute with."""
    layers = {path: module for path, module in quantized.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) == 210
    for path, layer in layers.items():
        dense.get_submodule(path).weight = nn.Parameter(layer.dense_weight(torch.float32), requires_grad=False)
