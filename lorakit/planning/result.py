"""What `plan` returns: plain numbers, bytes and FLOPs unless said otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..sizes import parse_size
from .flops import Flops


@dataclass(frozen=True)
class Suggestion:
    """A change of settings under which the plan fits.

    Attributes:
        changes: setting -> its new value: checkpointing, micro_batch_tokens, optimizer, quant_type.
        peak_bytes: under it.
        flops: of a step under it.
        more_flops: the share by which they exceed those of the plan: 0.25 is a quarter more.
    """

    changes: Mapping[str, str | int]
    peak_bytes: int
    flops: Flops
    more_flops: float

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.changes.items())


@dataclass(frozen=True)
class Cost:
    """What training on a data set takes.

    Attributes:
        tokens: of all epochs.
        flops: for them.
        flops_per_second: the rate that `seconds` is worked out with.
        seconds: flops / flops_per_second: a lower bound, as a step is more than matrix products.
        price: of those seconds, in the currency of price_per_hour; None where that was not given.
    """

    tokens: int
    flops: float
    flops_per_second: float
    seconds: float
    price: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training step will take.

    Attributes:
        parts: name -> bytes at the peak: weights, adapters, gradients, optimizer, activations, workspace, logits,
            runtime, allocator.
        moment: when the peak is: "the loss", "backward of the MLP of layer 29", ...
        flops: of a step, by part.
        parameters, adapter_parameters: of the model without the adapter; of the adapter.
        trainable: of the adapter's those that are trained: not A under LoRA-FA, nor where PiSSA started.
        sequences, length: of a forward pass (a micro-batch).
        micro_batches: forward passes of a step.
        step_tokens: of a step.
        device: "cpu" or "cuda".
        notes: what is not in these numbers.
        memory: the limit in bytes, or None.
        suggestions: where the limit does not hold the plan: changes that make it fit, the cheapest first.
        cost: of the data set, or None.
    """

    parts: Mapping[str, int]
    moment: str
    flops: Flops
    parameters: int
    adapter_parameters: int
    trainable: int
    sequences: int
    length: int
    micro_batches: int
    step_tokens: int
    device: str
    notes: tuple[str, ...] = ()
    memory: int | None = None
    suggestions: tuple[Suggestion, ...] = ()
    cost: Cost | None = None

    @property
    def peak_bytes(self) -> int:
        """The peak: the sum of the parts."""
        return sum(self.parts.values())

    def fits(self, limit: int | str) -> bool:
        """Return whether the peak is within a limit: bytes, or text such as "24GB"."""
        return self.peak_bytes <= limit_bytes(limit)


def limit_bytes(limit: int | str) -> int:
    """Return a limit in bytes, from bytes or text such as "24GB".

    Raises:
        ConfigError: it is not a positive size.
    """
    return parse_size(limit if isinstance(limit, str) else str(limit))
