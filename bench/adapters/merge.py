"""The share of an update that survives a merge into 4-bit weights: PEFT's merge beside ours, on SmolLM2's real layers.

Random updates of rank 16 have 1, 2, 5, 10 and 20% of the weight's norm, in all linear layers of four decoder layers.
The weights are NF4 in blocks of 64 with double quantization. The surviving share is the projection of the real change
on the intended one, over all these layers. PEFT's figure comes from its own `merge` of a bitsandbytes layer:
dequantize, add, quantize again. The 16-bit base is SmolLM2 dequantized from a Q4_1 file.

With --adapter, the command measures a trained adapter's scores on held-out records instead: unmerged, merged in each
way, and merged by PEFT. Our decoder generates with PEFT's merged weights too, so all answers come from the same code.
"same answers" is the share of records with exactly the answer of the adapter on its 4-bit base.

Run as: python -m bench.merge [--adapter RUN] [--rows 100] [--check] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before a peer is imported: everything is on disk

import torch

from bench.harness import peers
from bench.harness.plot import Picture
from bench.harness.report import NOT_INSTALLED, Target, arguments, finish
from lorakit import (
    Decoder,
    LoraConfig,
    add_adapter,
    disable_adapters,
    generate,
    load_adapter,
    load_model,
    merge_adapter,
    unmerge_adapter,
)
from lorakit.adapters import lora_layers
from lorakit.adapters.merging.report import share_of
from lorakit.data.chatterbot import build_chatterbot
from lorakit.evaluation import Score, evaluate_outputs, split_record
from lorakit.layers import AdaptedLayer
from lorakit.models import Tokenizer
from lorakit.runs.recipe import Recipe
from lorakit.runs.run import load_base, load_run_recipe, read_records

SIZES = (0.01, 0.02, 0.05, 0.1, 0.2)
RANK = 16
LAYERS = (0, 10, 20, 29)
PEFT = "PEFT: quantized again"
# name -> arguments of merge_adapter; the base is the folder that the model was loaded from.
WAYS: dict[str, dict[str, bool]] = {
    "ours, 16-bit base": {},
    "ours, 16-bit base, 4 bits": {"quantize": True},
    "ours, dequantized": {"base": False},
    "ours, 4 bits, no base": {"base": False, "quantize": True},
}
LEAST = dict(zip(WAYS, (0.97, 0.97, 0.95, 0.95), strict=True))


def survival(size: float) -> dict[str, float]:
    """Return the share of random updates of one size that survives each way of merging."""
    model = load_model("smollm2-135m-instruct")
    numbers = "|".join(map(str, LAYERS))
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=rf"model\.layers\.({numbers})\..*_proj")
    add_adapter(model, config)
    layers = lora_layers(model, "default")
    for layer in layers.values():
        a, b = layer.lora_A["default"].data.normal_(), layer.lora_B["default"].data.normal_()
        b *= size * layer.base_weight(torch.float32).norm() / (b @ a).norm()
    shares = {PEFT: peft_share([*layers.values()])} if peers.has("peft") and peers.has("bitsandbytes") else {}
    for name, how in WAYS.items():
        shares[name] = merge_adapter(model, **how).share  # type: ignore[arg-type]
        unmerge_adapter(model)
    return shares


def peft_share(layers: Sequence[AdaptedLayer]) -> float:
    """Return the share that PEFT's merge keeps of the updates of our layers, whose scaling is 1."""
    real, intended = [], []
    for layer in layers:
        lora_a, lora_b = (table["default"].detach() for table in (layer.lora_A, layer.lora_B))
        before, after = peers.merged_by_peft(layer.base_weight(torch.bfloat16), lora_a, lora_b)
        real.append((after - before).flatten())
        intended.append((lora_b @ lora_a).flatten())
    return share_of(torch.cat(real), torch.cat(intended))


# ---- with --adapter: the scores of a merged adapter ------------------------------------------------------------------


def task_rows(run: Path, count: int) -> tuple[list[str], list[list[object]]]:
    """Return columns and rows of the scores of a run's adapter, merged in each way."""
    recipe = load_run_recipe(run)
    if recipe.eval is None:
        sys.exit(f"{run / 'recipe.yaml'} has no eval section: no metrics to compare by")
    with data_of(recipe):
        held_out = read_records(recipe).held_out[:count]
        prompts, references = map(list, zip(*(split_record(record) for record in held_out), strict=True))
        answers = answers_of(recipe, run / "adapter", prompts)
        first = answers["adapter on 4 bits"]
        rows: list[list[object]] = []
        for name, given in answers.items():
            scores = evaluate_outputs(given, references, recipe.eval.metrics, samples=recipe.eval.bootstrap_samples)
            same = sum(a == b for a, b in zip(given, first, strict=True)) / len(first)
            rows.append([name, *(in_words(score) for score in scores.values()), same])
    return ["weights", *scores, "same answers"], rows


def answers_of(recipe: Recipe, adapter: Path, prompts: Sequence[Any]) -> dict[str, list[str]]:
    """Return the answers of the adapter, of each merge, and of PEFT's merge if PEFT is installed."""
    assert recipe.eval is not None  # the caller made sure
    model, tok = load_base(recipe)
    settings = recipe.eval.max_new_tokens, recipe.eval.batch_size
    load_adapter(model, adapter)
    answers = {"base, without adapter": [], "adapter on 4 bits": ask(model, tok, prompts, *settings)}
    with disable_adapters(model):
        answers["base, without adapter"] = ask(model, tok, prompts, *settings)
    for name, how in WAYS.items():
        merge_adapter(model, **how)  # type: ignore[arg-type]
        answers[name] = ask(model, tok, prompts, *settings)
        unmerge_adapter(model)
    if peers.has("peft") and peers.has("bitsandbytes") and peers.has("transformers"):
        assert model.folder is not None  # load_base sets it
        answers[PEFT] = ask(merged_model_of_peft(model.folder, adapter), tok, prompts, *settings)
    return answers


def ask(model: Decoder, tok: Tokenizer, prompts: Sequence[Any], max_new_tokens: int, batch_size: int) -> list[str]:
    """Return the answers to all prompts."""
    print(f"  {len(prompts)} answers ...", file=sys.stderr, flush=True)
    return list(generate(model, tok, list(prompts), max_new_tokens, batch_size=batch_size))


def merged_model_of_peft(folder: Path, adapter: Path) -> Decoder:
    """Return our decoder with the weights of PEFT's merge of a bitsandbytes model, dequantized to bf16."""
    from peft import PeftModel

    from bench.training.sides.peft_step import load

    merged = PeftModel.from_pretrained(load(folder, "nf4", "sdpa"), adapter).merge_and_unload()
    model = load_model(folder, quant_type=None)
    for path, layer in merged.named_modules():
        if type(layer).__name__ == "Linear4bit":
            model.get_submodule(path).weight.data.copy_(peers.values_of_bitsandbytes(layer))  # type: ignore[operator]
    return model


@contextlib.contextmanager
def data_of(recipe: Recipe) -> Iterator[None]:
    """Within the context the recipe's data exist; the quickstart's are built if they are missing."""
    if recipe.data.train.is_file():
        yield
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        build_chatterbot(recipe.data.train.parent)
        yield


def in_words(score: Score) -> str:
    """Return a score with its interval."""
    return f"{score.value:.3g} [{score.low:.3g}, {score.high:.3g}]"


def main() -> None:
    """Measure, print, compare with the targets."""
    parser = arguments(str(__doc__), plots=True)
    parser.add_argument("--adapter", type=Path, metavar="RUN", help="measure the scores of this run's adapter")
    parser.add_argument("--rows", type=int, default=100, help="held-out records for the scores")
    options = parser.parse_args()
    if options.adapter:
        columns, rows = task_rows(options.adapter.resolve(), options.rows)
        finish(options, f"{options.adapter.name}: {options.rows} held-out records", columns, rows)
        return
    shares = {size: survival(size) for size in SIZES}
    names = [PEFT, *WAYS]
    rows = [[f"{size:.0%}", *(found.get(name, NOT_INSTALLED) for name in names)] for size, found in shares.items()]
    targets = [
        Target(f"{name}, update of {size:.0%}", shares[size][name], LEAST[name], at_least=True)
        for size in SIZES
        for name in WAYS
    ]
    picture = Picture("share of the update that survived", {f"{s:.0%}": found for s, found in shares.items()})
    finish(options, "share of the update that survives a merge", ["update", *names], rows, targets, picture)


if __name__ == "__main__":
    main()
