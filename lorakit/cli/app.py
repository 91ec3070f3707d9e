"""The commands of `lorakit`. Each is a thin layer over one call of the library."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..adapters.exports import EXPORTS
from ..data.data_sets import DATA_SETS, build_data_set
from ..data.formats import AUTO, RECORD_FORMATS
from ..errors import ConfigError
from ..quantization import QUANT_TYPES
from .combine import combine, resize
from .console import Interrupted, Overwrite, check_target, console, say
from .generate import generate
from .inspect import inspect
from .merge import merge

app = typer.Typer(
    help="LoRA and QLoRA: fine-tune, measure whether it helped, look inside.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Build and view training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")
for command in (generate, combine, resize, merge, inspect):
    app.command()(command)

RunFolder = Annotated[Path, typer.Argument(help="folder of a finished run", show_default=False)]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a key, e.g. train.lr=1e-4")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the last checkpoint")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the run in the output folder, once the new one is whole")
    ] = False,
) -> None:
    """Fine-tune as a recipe says, evaluate before and after, write a report."""
    from ..runs.recipe import load_recipe
    from ..runs.run import train_run
    from ..runs.run_folder import how_to_go_on

    settings = load_recipe(recipe, set_ or [])
    try:
        metrics = train_run(settings, say, resume, overwrite)
    except KeyboardInterrupt:
        raise Interrupted(how_to_go_on(settings.output)) from None
    _print_outcome(metrics, settings.output)


@app.command("eval")
def evaluate(run: RunFolder) -> None:
    """Evaluate a finished run again and rewrite its report."""
    from ..runs.run import evaluate_run

    _print_outcome(evaluate_run(run, say), run)


@app.command()
def chat(
    run: RunFolder,
    base: Annotated[bool, typer.Option("--base", help="talk to the base model, without the adapter")] = False,
    system: Annotated[str | None, typer.Option(help="system prompt; default: that of the run's data")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="maximum tokens in an answer")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
) -> None:
    """Talk to a run's tuned model, or with --base to the model that it started from."""
    from ..models import generate as answer_of
    from ..runs.chat import Chat

    session = Chat(run, adapted=not base, system=system)
    console.print(f"[dim]{escape(session.description)} - an empty line ends[/dim]", soft_wrap=True)
    while line := _ask():
        messages = session.ask(line)
        answer = answer_of(session.model, session.tok, messages, max_new_tokens, temperature)
        session.answer(str(answer))
        say(str(answer))


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="folder of a 16-bit model, or a known name", show_default=False)],
    target: Annotated[Path, typer.Argument(help="folder to write", show_default=False)],
    *,
    quant_type: Annotated[str, typer.Option(help=f"codebook: {' or '.join(QUANT_TYPES)}")] = "nf4",
    block_size: Annotated[int, typer.Option(help="elements that share a scale: 32, 64, ..., 4096")] = 64,
    double_quant: Annotated[bool, typer.Option(help="store the scales in 8 bits")] = True,
    storage_dtype: Annotated[str, typer.Option(help="dtype to store: uint8, bfloat16, float16, float32")] = "uint8",
    shard_size: Annotated[str, typer.Option(help="maximum size of one file, e.g. 5GB, 500MB")] = "5GB",
    skip: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="more linear layers to leave in 16 bits")
    ] = None,
) -> None:
    """Write a 4-bit copy of a model, for lorakit and for transformers with bitsandbytes.

    To continue after an interruption, give the same command again.
    """
    from ..models.quantize_checkpoint import quantize_checkpoint
    from ..quantization.policy import DEFAULT_SKIP, QuantConfig
    from ..sizes import parse_size
    from .progress import byte_progress

    chosen: dict[str, Any] = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
    chosen |= {"storage_dtype": storage_dtype, "skip": (*DEFAULT_SKIP, *(skip or []))}
    config = QuantConfig(**chosen)
    with byte_progress(console) as progress:
        written = quantize_checkpoint(source, target, config, parse_size(shard_size), progress)
    say(str(written))


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="folder of an adapter or a run", show_default=False)],
    *,
    target: Annotated[str, typer.Option(help=f"program to export for: {', '.join(EXPORTS)}", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder to write; for llama.cpp a file", show_default=False)],
    base: Annotated[
        str | None, typer.Option(help="folder or known name of the base; default: the one that the adapter names")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the adapter's")] = None,
    max_rank: Annotated[int | None, typer.Option(help="refuse ranks above this, e.g. vLLM's limit")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter in the form that another program reads correctly."""
    import torch

    from ..adapters import export_adapter
    from ..models import resolve_model

    dtypes = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ConfigError(f"--dtype {dtype}: expected float32, bfloat16 or float16")
    check_target(out, overwrite)
    folder = None if base is None else resolve_model(base)
    say(f"{export_adapter(adapter, out, target, folder, dtypes[dtype], max_rank)}: the adapter, for {target}")


def _pairs(option: str, values: list[str] | None, example: str) -> dict[str, Any]:
    """Return the settings of a repeatable option KEY=VALUE."""
    pairs = [value.partition("=") for value in values or []]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise ConfigError(f"{option} {wrong[0]}: expected KEY=VALUE, such as {example}")
    return {name: value for name, _, value in pairs}


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="folder, config.json or known name", show_default=False)],
    *,
    memory: Annotated[str | None, typer.Option(help="limit, e.g. 24GB or 512MiB")] = None,
    length: Annotated[int | None, typer.Option(help="tokens of the longest sequence")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a training setting, e.g. batch_size=8")
    ] = None,
    r: Annotated[int, typer.Option("-r", help="rank of the adapter")] = 16,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="an adapter setting in YAML, e.g. use_dora=true")
    ] = None,
    quant_type: Annotated[str, typer.Option(help=f"codebook: {', '.join(QUANT_TYPES)} or none")] = "nf4",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dataset_tokens: Annotated[int | None, typer.Option(help="tokens of the training data, to predict the time")] = None,
    flops_per_second: Annotated[float | None, typer.Option(help="speed of the machine; default: measured")] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="price of the machine, to predict the cost")] = None,
) -> None:
    """Predict memory by part, operations and cost of training, from a model's config.json alone."""
    import yaml

    from .. import planning
    from ..adapters import LoraConfig
    from ..training import TrainConfig

    settings = _pairs("--set", set_, "batch_size=8")
    adapter = {"r": r} | {
        name: yaml.safe_load(value) for name, value in _pairs("--lora", lora, "use_dora=true").items()
    }
    result = planning.plan(
        model, LoraConfig(**adapter), TrainConfig(**settings), quant_type=None if quant_type == "none" else quant_type,
        sequence_length=length, device=device, memory=memory, dataset_tokens=dataset_tokens,
        flops_per_second=flops_per_second, price_per_hour=price_per_hour,
    )  # fmt: skip
    result.print_to(console)


@data_app.command("build")
def build(
    name: Annotated[str, typer.Argument(help=f"data set: {', '.join(DATA_SETS)}", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder to write", show_default=False)],
    seed: Annotated[int, typer.Option(help="seed of the split")] = 0,
) -> None:
    """Build a ready-made data set."""
    say(str(build_data_set(name, out, seed)))


@data_app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="JSONL file of conversations", show_default=False)],
    model: Annotated[str, typer.Option(help="folder or known name of the model with the tokenizer and chat template")],
    count: Annotated[int, typer.Option("-n", help="conversations to show")] = 3,
    max_length: Annotated[int, typer.Option(help="longest conversation in tokens")] = 1024,
    format: Annotated[str, typer.Option(help=f"record format: {AUTO} or {', '.join(RECORD_FORMATS)}")] = AUTO,
) -> None:
    """Show conversations as the model gets them, with the trained tokens marked, and check the whole file."""
    from ..data import check_records, describe_example, encode_records, load_records
    from ..models import load_tokenizer, resolve_model

    tok = load_tokenizer(resolve_model(model))
    records = load_records(file, format)
    examples = encode_records(tok, records, max_length)
    for example in examples[:count]:
        console.print(describe_example(tok, example), end="\n\n", soft_wrap=True)
    lengths = sorted(length for example in examples for length in example.lengths)
    trained = sum(sum(example.loss_mask) for example in examples)
    console.print(
        f"{len(examples)} conversations, {sum(lengths):,} tokens, {trained:,} trained; "
        f"median {lengths[len(lengths) // 2]}, longest {lengths[-1]}"
    )
    if len(lengths) > len(examples):
        console.print(
            f"{len(lengths)} renderings, because the chat template changes earlier turns when another is added"
        )
    if tok.is_dated:
        console.print(f"date in the conversations: {tok.date}")
    say(str(check_records(records)))


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _print_outcome(metrics: dict[str, Any], folder: Path) -> None:
    """Print the table, the verdict in one sentence and the next commands."""
    if "tuned" in metrics:
        console.print(_table(metrics))
        console.print(f"\n[bold]{escape(metrics['verdict']['sentence'])}[/bold]\n", soft_wrap=True)
    seconds = metrics["seconds"]["total"]
    console.print(f"{seconds:.0f} s, peak memory {metrics['peak_rss_mb']:,.0f} MiB", end="")
    say(f"; report: {folder / 'report.html'}" if "tuned" in metrics else "")
    say("\nNext:")
    run, adapter = (shlex.quote(str(path)) for path in (folder, folder / "adapter"))
    say(f"  lorakit chat {run}                  talk to it (--base: to the model that it started from)")
    say("  lorakit train RECIPE.yaml              your own data: docs/how-to/own-data.md")
    say(f"  rm -r {adapter}          roll back: the base model was never changed")


def _table(metrics: dict[str, Any]) -> Table:
    from ..runs.wording import base_heading

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("", base_heading(metrics).lower(), "tuned, short prompt"):
        table.add_column(heading, justify="right" if heading else "left")
    before, after = metrics["base_prompted"], metrics["tuned"]
    for name, value in after.items():
        if name == "intervals":
            continue
        table.add_row(escape(name), _cell(before, name, before[name]), _cell(after, name, value))
    return table


def _cell(side: dict[str, Any], name: str, value: float | None) -> str:
    if value is None:  # JSON has neither NaN nor infinity
        return "not finite"
    interval = side["intervals"].get(name)
    return f"{value:.3g}" if interval is None else escape(f"{value:.3g} [{interval[0]:.3g}, {interval[1]:.3g}]")
