"""`lorakit.train` against a loop written out with PEFT: the same losses from the same start, on the same batches.

In fp32, where rounding is all that may differ. Our side runs padding-free and, in one case, in several micro-batches;
theirs runs one padded batch a step.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from lorakit import Decoder, LoraConfig, Record, Tokenizer, TrainConfig, add_adapter, load_model, save_adapter, train
from lorakit.data import Example, Message, batch_order, encode_records
from lorakit.layers import Linear4bit
from lorakit.training.schedule import learning_rate

peft = importlib.import_module("peft")

Fresh = Callable[[nn.Module], nn.Module]
STEPS = 20
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
    history = train(ours, tok, short_records, config).history
    examples = encode_records(tok, short_records, config.max_length)
    their_losses, their_norms = train_peft(start, examples, config)

    our_losses = [row["loss"] for row in history]
    assert sum(our_losses[-5:]) < 0.8 * sum(our_losses[:5])  # it learns, so that there is something to compare
    assert our_losses == pytest.approx(their_losses, rel=1e-4)
    assert [row["grad_norm"] for row in history] == pytest.approx(their_norms, rel=1e-4)


def test_a_transformers_model_trains_as_ours_does(
    our_model: Decoder, their_model: nn.Module, fresh: Fresh, tok: Tokenizer, short_records: list[Record]
) -> None:
    config = TrainConfig(lr=1e-3, batch_size=3, max_steps=3, progress=False)
    losses = []
    for model in (fresh(our_model), fresh(their_model)):
        torch.manual_seed(1)
        add_adapter(model, LORA)
        losses.append([row["loss"] for row in train(model, tok, short_records[:9], config).history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def train_peft(model: nn.Module, examples: Sequence[Example], config: TrainConfig) -> tuple[list[float], list[float]]:
    """Train as our docs say we do; return the losses and the gradients' norms."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, eps=config.eps, weight_decay=config.weight_decay)
    epochs = (batch_order(len(examples), config.batch_size, config.seed, epoch) for epoch in range(STEPS))
    batches = [batch for epoch in epochs for batch in epoch][:STEPS]
    losses, norms = [], []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, STEPS, config.lr, config.warmup_ratio, config.min_lr_ratio
        )
        loss = padded_loss(model, [examples[i] for i in batch])
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


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
