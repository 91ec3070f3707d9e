"""The results of `plan`: plain numbers, in bytes and FLOPs unless stated otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..printed import Printed, as_text
from ..sizes import format_size, parse_size
from .flops import Flops

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Suggestion:
    """A change of settings under which the plan fits.

    Attributes:
        changes: setting -> its new value: checkpointing, micro_batch_tokens, optimizer, quant_type.
        peak_bytes: peak memory with the change.
        flops: FLOPs of a step with the change.
        more_flops: the share by which they exceed those of the plan; 0.25 is a quarter more.
    """

    changes: Mapping[str, str | int]
    peak_bytes: int
    flops: Flops
    more_flops: float

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.changes.items())


@dataclass(frozen=True)
class Cost:
    """Operations, time and price of training on a data set.

    Attributes:
        tokens: tokens of all epochs.
        flops: FLOPs for these tokens.
        flops_per_second: the speed behind `seconds`.
        seconds: flops / flops_per_second, a lower bound, since a step is more than matrix products.
        price: price of these seconds, in the currency of price_per_hour; None without price_per_hour.
    """

    tokens: int
    flops: float
    flops_per_second: float
    seconds: float
    price: float | None


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan(Printed):
    """The predicted memory and operations of a training step.

    Attributes:
        parts: name -> bytes at the peak: weights, adapters, gradients, optimizer, activations, workspace, logits,
            runtime, allocator.
        moment: the moment of the peak: "the loss", "backward of the MLP of layer 29", ...
        flops: FLOPs of a step, by part.
        parameters, adapter_parameters: parameters of the model without the adapter; of the adapter.
        trainable: the adapter's trained parameters, without A under LoRA-FA and PiSSA's start.
        sequences, length: sequences of a forward pass (a micro-batch), and tokens of each.
        micro_batches: forward passes of a step.
        step_tokens: tokens of a step.
        device: "cpu" or "cuda".
        notes: memory that these numbers leave out.
        memory: the limit in bytes, or None.
        suggestions: for a plan above the limit, changes that make it fit, the cheapest first.
        cost: cost of the data set, or None.
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

    def __str__(self) -> str:
        return as_text(self.print_to)

    def print_to(self, console: Console) -> None:
        """Print the parts of the peak, the FLOPs, whether the plan fits or which changes make it fit, and the cost."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        table.add_column(f"peak memory, in {self.moment}")
        table.add_column("", justify="right")
        for name, size in sorted(self.parts.items(), key=lambda part: -part[1]):
            table.add_row(name, format_size(size))
        table.add_row("[bold]together[/bold]", f"[bold]{format_size(self.peak_bytes)}[/bold]")
        console.print(table)
        console.print(
            f"\n{self.trainable:,} of {self.parameters + self.adapter_parameters:,} parameters are trained; "
            f"a step of {self.step_tokens:,} tokens "
            f"({self.micro_batches} x {self.sequences} sequences of {self.length}) takes "
            f"{self.flops.total / 1e12:.3g} Tflop",
            soft_wrap=True,
        )
        if self.memory is not None and self.fits(self.memory):
            console.print(f"[bold]It fits {format_size(self.memory)}.[/bold]")
        elif self.memory is not None:
            console.print(f"[bold]It does not fit {format_size(self.memory)}.[/bold] It would with one of:")
            for change in self.suggestions:
                more = f", {change.more_flops:+.0%} operations" if change.more_flops else ""
                console.print(f"  {change}: {format_size(change.peak_bytes)}{more}", markup=False, soft_wrap=True)
        for note in self.notes:
            console.print(f"Not counted: {note}.", markup=False, soft_wrap=True)
        if self.cost is not None:
            price = "" if self.cost.price is None else f", {self.cost.price:,.2f} at that price"
            console.print(
                f"{self.cost.tokens:,} tokens: at least {self.cost.seconds / 3600:.2f} h at "
                f"{self.cost.flops_per_second / 1e12:.3g} Tflop/s{price}",
                soft_wrap=True,
            )

    def __repr__(self) -> str:
        return f"<Plan: peak {format_size(self.peak_bytes)} in {self.moment}; print it for the parts>"

    def fits(self, limit: int | str) -> bool:
        """Return whether the peak is within a limit: bytes, or text such as "24GB"."""
        return self.peak_bytes <= limit_bytes(limit)


def limit_bytes(limit: int | str) -> int:
    """Return a limit in bytes, from bytes or text such as "24GB".

    Raises:
        ConfigError: the limit is not a positive size.
    """
    return parse_size(limit if isinstance(limit, str) else str(limit))
