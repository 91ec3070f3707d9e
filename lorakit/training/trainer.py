"""The training loop, written so that it reads like the algorithm.

    for each step:
        take the next batch_size conversations
        loss = sum of -log p(token) over all their trained tokens / number of trained tokens
        gradients of the adapter, clipped to a global norm
        one step of the optimizer at the scheduled learning rate

The loss of a step is exact for any micro-batching: micro-batches add up sums, and these are divided by the number of
trained tokens in the whole step.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import idle_adapters
from ..data import Example, Record, batch_order, encode_records, make_batch, micro_batches
from ..errors import DataError, TrainingError
from ..measure import peak_rss_mb
from ..models.decoder.loss import summed_loss
from ..models.tokenizer.tokenizer import Tokenizer
from ..sums import flat_slices
from .activations import saving_activations
from .checkpoints import load_checkpoint, on_first_day, save_checkpoint
from .compiling import compiled_layers
from .config import TrainConfig
from .lora_fa import frozen_a
from .optimizers import Optimizer, states_to_host, step_from_host
from .optimizers.build import build_optimizer, set_learning_rate
from .output import CHECKPOINTS, LOG, OutputFolder
from .preparation import check_examples, check_room, fingerprint_of
from .printed import PrintedTraining
from .probe import TrainingProbe
from .runlog import RunLog
from .schedule import learning_rate


@dataclass(repr=False)
class TrainResult(PrintedTraining):
    """The outcome of a training run.

    Attributes:
        steps: optimizer steps taken.
        history: one row a step: step, loss (nats per trained token), lr, grad_norm, trained_tokens, tokens, seconds,
            step_seconds, peak_rss_mb, and eval_loss where it was measured.
        trained_tokens, tokens: totals; trained tokens count in the loss.
        seconds: duration of the loop, without encoding.
        eval_loss: held-out loss at the end, nats per trained token; None without held-out records.
    """

    steps: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    trained_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    eval_loss: float | None = None


def train(
    model: nn.Module,
    tok: Tokenizer,
    train_records: Sequence[Record | Mapping[str, Any]],
    config: TrainConfig | None = None,
    eval_records: Sequence[Record | Mapping[str, Any]] = (),
    resume: bool = False,
    *,
    probes: Sequence[TrainingProbe] = (),
    place: OutputFolder | None = None,
) -> TrainResult:
    """Fine-tune the trainable parameters of a model (the active adapter's) on conversations.

    Args:
        model: a `Decoder`, or another causal language model, with an adapter attached.
        train_records: conversations, or dicts such as {"messages": [...]}; the assistant's turns are trained.
        eval_records: held-out conversations; their loss is measured at the end and every `eval_every` steps.
        resume: continue from the last checkpoint in config.output, bit for bit as if the run had not stopped, and with
            the date of its first day, unless `tok` has its own; without a checkpoint there, begin with a warning and
            keep the log that is there under another name.
        probes: observers, which do not change the result.
        place: where the run writes, if not plainly to config.output; already claimed.

    Raises:
        DataError: records cannot be encoded or do not fit the model (the first 20 are named), or there is none.
        TrainingError: nothing is trainable, the loss is not finite, or the checkpoint belongs to another run.
        StorageError: the disk has too little room, or another process trains into the same folder.
    """
    config = config or TrainConfig()
    with contextlib.ExitStack() as while_training:
        if place is None:
            place = OutputFolder(config.output)
            while_training.enter_context(place.claimed())
        tok = on_first_day(tok, place.folders if resume else [])
        while_training.enter_context(frozen_a(model, config.lora_fa))
        parameters = _trained_parameters(model)
        examples = encode_records(tok, train_records, config.max_length)
        held_out = encode_records(tok, eval_records, config.max_length)
        if not examples:
            raise DataError("there is no training record")
        check_examples(model, [*examples, *held_out])
        per_epoch = math.ceil(len(examples) / config.batch_size)
        steps = config.max_steps or max(1, round(config.epochs * per_epoch))
        optimizer = build_optimizer(parameters, config)
        optimizer.zero_grad(set_to_none=True)  # drop gradients left by the caller or an interrupted run
        check_room(place.path, parameters, optimizer, config)
        fingerprint = fingerprint_of(config, optimizer, examples, model, parameters) if place.path else {}
        checkpoint = place.find_checkpoint(fingerprint) if resume else None
        torch.manual_seed(config.seed)
        result = _resumed(checkpoint, parameters, optimizer, fingerprint, config)
        started = time.perf_counter() - (result.history[-1]["seconds"] if result.history else 0.0)

        while_training.enter_context(_mode(model, training=True))
        while_training.enter_context(saving_activations(model, config.checkpointing, config.offload_activations))
        while_training.enter_context(compiled_layers(model, config.compile))
        folder = place.begin(checkpoint)
        log = while_training.enter_context(RunLog(folder and folder / LOG, steps, result.history, config.progress))
        for probe in probes:
            while_training.callback(probe.end)
            probe.begin(model, examples, held_out, folder, result.steps)
        for step in range(result.steps, steps):
            order = batch_order(len(examples), config.batch_size, config.seed, step // per_epoch)
            batch = [examples[i] for i in order[step % per_epoch]]
            lr = learning_rate(step, steps, config.lr, config.warmup_ratio, config.min_lr_ratio)
            for probe in probes:
                probe.before_step(step + 1)
            row = {"step": step + 1, "steps": steps, **take_step(model, batch, optimizer, lr, config, probes)}
            row |= {"seconds": time.perf_counter() - started, "peak_rss_mb": peak_rss_mb()}
            result.steps = step + 1
            if held_out and (_is_due(result.steps, config.eval_every) or result.steps == steps):
                row["eval_loss"] = result.eval_loss = mean_loss(model, held_out, config.micro_batch_tokens)
            log.step(row)
            for probe in probes:
                probe.after_step(row)
            if folder and _is_due(result.steps, config.checkpoint_every):
                progress = {"history": log.rows, "date": tok.date.isoformat()}
                save_checkpoint(folder / CHECKPOINTS, result.steps, parameters, optimizer, fingerprint, progress)
    result.trained_tokens = sum(row["trained_tokens"] for row in result.history)
    result.tokens = sum(row["tokens"] for row in result.history)
    result.seconds = time.perf_counter() - started
    return result


def take_step(
    model: nn.Module,
    batch: Sequence[Example],
    optimizer: Optimizer,
    lr: float,
    config: TrainConfig,
    probes: Sequence[TrainingProbe] = (),
) -> dict[str, Any]:
    """Take one optimizer step; return its row of the log.

    Raises:
        TrainingError: the loss or a gradient is not finite; the parameters are unchanged.
    """
    started = time.perf_counter()
    loss, trained = accumulate_gradients(model, batch, config.micro_batch_tokens, probes)
    for probe in probes:
        probe.before_update()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [piece for p in parameters if p.grad is not None for piece in flat_slices(p.grad)]
    total_norm = nn.utils.get_total_norm(gradients)
    nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, total_norm)
    norm = float(total_norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        sources = ", ".join(example.source for example in batch[:4])
        raise TrainingError(
            f"the loss is {loss} and the gradient's norm {norm} at learning rate {lr:.2g}, on {sources}...; "
            "lower the learning rate, or look at those records"
        )
    set_learning_rate(optimizer, lr)
    if config.offload_optimizer:
        step_from_host(optimizer)
    else:
        optimizer.step()
    for probe in probes:
        probe.after_update()
    optimizer.zero_grad(set_to_none=True)
    return {
        "loss": loss, "lr": lr, "grad_norm": norm, "trained_tokens": trained,
        "tokens": sum(len(example.input_ids) for example in batch), "step_seconds": time.perf_counter() - started,
    }  # fmt: skip


def accumulate_gradients(
    model: nn.Module, batch: Sequence[Example], token_budget: int, probes: Sequence[TrainingProbe] = ()
) -> tuple[float, int]:
    """Add the gradient of a step's loss to the parameters' `.grad`; return the loss and the number of trained tokens.

    The loss is the sum over all trained tokens of the step divided by their number, for any cut into micro-batches.
    """
    device = next(model.parameters()).device
    groups = micro_batches(batch, token_budget)
    packed = [make_batch(group) for group in groups]
    trained = sum(micro_batch.trained_tokens for micro_batch in packed)
    total = 0.0
    for group, micro_batch in zip(groups, packed, strict=True):
        losses = torch.empty(micro_batch.trained_tokens, device=device) if probes else None
        input_ids, targets = micro_batch.input_ids.to(device), micro_batch.targets.to(device)
        loss = summed_loss(model, input_ids, targets, micro_batch.lengths, losses)
        (loss / trained).backward()
        total += float(loss.detach())
        for probe in probes:
            assert losses is not None
            probe.after_micro_batch(group, micro_batch, losses)
    return total / trained, trained


@torch.no_grad()
def mean_loss(model: nn.Module, examples: Sequence[Example], token_budget: int) -> float:
    """Return the loss in nats per trained token over all examples, in eval mode.

    Raises:
        DataError: there is no example.
    """
    if not examples:
        raise DataError("there is no example to measure the loss on")
    device = next(model.parameters()).device
    total, trained = 0.0, 0
    with _mode(model, training=False):
        for group in micro_batches(examples, token_budget):
            batch = make_batch(group)
            total += float(summed_loss(model, batch.input_ids.to(device), batch.targets.to(device), batch.lengths))
            trained += batch.trained_tokens
    return total / trained


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put the model in training or eval mode within the context."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name; raise TrainingError if there are none, or their adapter is not active."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise TrainingError(
            "the model has no trainable parameter; attach an adapter with add_adapter, or choose one with set_trained"
        )
    if idle := idle_adapters(model):
        raise TrainingError(
            f"adapter '{idle[0]}' is to be trained but is not active, so nothing would reach it; make it active with "
            "set_adapter, or choose what to train with set_trained"
        )
    return parameters


def _resumed(
    checkpoint: Path | None,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    fingerprint: Mapping[str, Any],
    config: TrainConfig,
) -> TrainResult:
    """Load a checkpoint, if there is one, into parameters and optimizer; return the run's state there."""
    result = TrainResult()
    if checkpoint is not None:
        result.steps, progress = load_checkpoint(checkpoint, parameters, optimizer, fingerprint)
        if config.offload_optimizer:
            states_to_host(optimizer)
        result.history = progress["history"]
        result.eval_loss = result.history[-1].get("eval_loss")
    return result
