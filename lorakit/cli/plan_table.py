"""The output of `lorakit plan`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..planning import Plan
from ..sizes import format_size


def print_plan(console: Console, plan: Plan) -> None:
    """Print the parts of the peak, the FLOPs, whether the plan fits or which changes make it fit, and the cost."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(f"peak memory, in {plan.moment}")
    table.add_column("", justify="right")
    for name, size in sorted(plan.parts.items(), key=lambda part: -part[1]):
        table.add_row(name, format_size(size))
    table.add_row("[bold]together[/bold]", f"[bold]{format_size(plan.peak_bytes)}[/bold]")
    console.print(table)
    console.print(
        f"\n{plan.trainable:,} of {plan.parameters + plan.adapter_parameters:,} parameters are trained; "
        f"a step of {plan.step_tokens:,} tokens ({plan.micro_batches} x {plan.sequences} sequences of {plan.length}) "
        f"takes {plan.flops.total / 1e12:.3g} Tflop",
        soft_wrap=True,
    )
    if plan.memory is not None and plan.fits(plan.memory):
        console.print(f"[bold]It fits {format_size(plan.memory)}.[/bold]")
    elif plan.memory is not None:
        console.print(f"[bold]It does not fit {format_size(plan.memory)}.[/bold] It would with one of:")
        for change in plan.suggestions:
            more = f", {change.more_flops:+.0%} operations" if change.more_flops else ""
            console.print(f"  {change}: {format_size(change.peak_bytes)}{more}", markup=False, soft_wrap=True)
    for note in plan.notes:
        console.print(f"Not counted: {note}.", markup=False, soft_wrap=True)
    if plan.cost is not None:
        price = "" if plan.cost.price is None else f", {plan.cost.price:,.2f} at that price"
        console.print(
            f"{plan.cost.tokens:,} tokens: at least {plan.cost.seconds / 3600:.2f} h at "
            f"{plan.cost.flops_per_second / 1e12:.3g} Tflop/s{price}",
            soft_wrap=True,
        )
