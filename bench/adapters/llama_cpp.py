"""An adapter in llama.cpp beside the same adapter in lorakit: agreement of the most likely tokens.

The adapter is exported for llama.cpp and loaded on the GGUF file that our SmolLM2 was made from. Both sides read the
held-out conversations, and their most likely next tokens are compared at positions in the answers: base with base,
tuned with tuned, and tuned with base, to show the adapter's effect. With the original file, llama.cpp multiplies Q4_1
weights with activations rounded to 8 bits and keeps keys and values in 16 bits. With a second file that has our weights
in fp32, and with keys and values in fp32, nothing is rounded. A difference there is an error in the export.

Run as: python -m bench.llama_cpp [--adapter runs/quickstart/adapter] [--records runs/quickstart/data/eval.jsonl]
                                  [--positions 500] [--check] [--json FILE]
`make llama-cpp` builds llama.cpp first (the package llama-cpp-python, from source: about ten minutes).
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness.report import Target, arguments, finish
from lorakit import disable_adapters, load_adapter, load_model, load_records, load_tokenizer
from lorakit.adapters import export_adapter
from lorakit.data import encode_records
from lorakit.models import resolve_model
from lorakit.models.gguf.gguf_file import open_gguf
from lorakit.models.pretrained import KNOWN_MODELS

MODEL = "smollm2-135m-instruct"
CONTEXT = 512
SAME_QUANTIZED, SAME_EXACT = 0.95, 0.998  # shares of the tokens; nearly equal logits may still swap


@dataclass(frozen=True)
class Positions:
    """Sequences of token ids, and the positions in each whose next token is compared."""

    sequences: list[list[int]]
    places: list[list[int]]


@dataclass(frozen=True)
class Logits:
    """The logits of one side at all positions, (positions, vocabulary), without and with the adapter."""

    base: Tensor
    tuned: Tensor


def held_out_positions(records: Path, count: int) -> Positions:
    """Return `count` positions before a trained token, from every n-th conversation with n as large as possible."""
    examples = encode_records(load_tokenizer(resolve_model(MODEL)), load_records(records), CONTEXT)
    answers = [[place - 1 for place, trained in enumerate(example.loss_mask) if trained] for example in examples]
    if sum(map(len, answers)) < count:
        sys.exit(f"{records} has {sum(map(len, answers))} positions in answers, fewer than {count}")
    step = max(step for step in range(1, len(examples) + 1) if sum(map(len, answers[::step])) >= count)
    everywhere = [(n, place) for n in range(0, len(examples), step) for place in answers[n]]
    chosen = [everywhere[k * len(everywhere) // count] for k in range(count)]
    numbers = sorted({n for n, _ in chosen})
    return Positions([examples[n].input_ids for n in numbers], [[p for m, p in chosen if m == n] for n in numbers])


@torch.inference_mode()
def ours(adapter: Path, positions: Positions) -> Logits:
    """Compute in fp32 with our decoder and the 16-bit weights."""
    model = load_model(resolve_model(MODEL), quant_type=None, dtype=torch.float32)
    load_adapter(model, adapter)

    def logits() -> Tensor:
        pairs = zip(positions.sequences, positions.places, strict=True)
        return torch.cat([model(torch.tensor([ids]))[0, places] for ids, places in pairs])

    with disable_adapters(model):
        base = logits()
    return Logits(base, logits())


def theirs(weights: Path, adapter: Path, positions: Positions, exact: bool) -> Logits:
    """Compute with llama.cpp; `exact`: keys and values in fp32."""
    package = importlib.import_module("llama_cpp")
    kinds = {"type_k": package.GGML_TYPE_F32, "type_v": package.GGML_TYPE_F32} if exact else {}

    def logits(lora: Path | None) -> Tensor:
        model = package.Llama(
            str(weights), lora_path=lora and str(lora), n_ctx=CONTEXT, n_batch=CONTEXT, n_ubatch=CONTEXT,
            logits_all=True, n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads(),
            verbose=False, **kinds,
        )  # fmt: skip
        found = []
        for ids, places in zip(positions.sequences, positions.places, strict=True):
            model.reset()
            model.eval(ids)
            found.append(torch.from_numpy(model.scores[places].copy()))
        model.close()
        return torch.cat(found)

    return Logits(logits(None), logits(adapter))


def gguf_in_wheel() -> Path:
    """Return the GGUF file that our checkpoint was converted from."""
    known = KNOWN_MODELS[MODEL]
    return Path(str(metadata.distribution(known.package).locate_file(known.file)))


def write_exact_gguf(source: Path, target: Path) -> None:
    """Copy a GGUF file with each tensor in fp32, with our checkpoint's values, which are rounded to bf16."""
    gguf: Any = importlib.import_module("gguf")
    opened = open_gguf(source)
    writer = gguf.GGUFWriter(target, opened.value("general.architecture", str))
    for key, field in opened.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), kind, sub_type=inner)
    for name in opened.tensors:
        writer.add_tensor(name, opened.read(name).bfloat16().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def same(one: Tensor, other: Tensor) -> float:
    """Return the share of positions at which the most likely token is the same."""
    return float((one.argmax(dim=1) == other.argmax(dim=1)).float().mean())


def effect_error(one: Logits, other: Logits) -> float:
    """Return the difference of the adapter's effects, tuned - base: its norm over the norm of the effect."""
    effect = other.tuned - other.base
    return float((one.tuned - one.base - effect).norm() / effect.norm())


def main() -> None:
    """Compare, print the table, and the targets."""
    parser = arguments(str(__doc__))
    parser.add_argument("--adapter", type=Path, default=Path("runs/quickstart/adapter"))
    parser.add_argument("--records", type=Path, default=Path("runs/quickstart/data/eval.jsonl"))
    parser.add_argument("--positions", type=int, default=500)
    options = parser.parse_args()
    positions = held_out_positions(options.records, options.positions)
    mine = ours(options.adapter, positions)
    rows, targets = [], []
    with tempfile.TemporaryDirectory() as folder:
        lora = export_adapter(options.adapter, Path(folder) / "adapter.gguf", "llama.cpp", resolve_model(MODEL))
        exact_weights = Path(folder) / "fp32.gguf"
        write_exact_gguf(gguf_in_wheel(), exact_weights)
        files = (("as it is, Q4_1", gguf_in_wheel(), SAME_QUANTIZED), ("our weights, fp32", exact_weights, SAME_EXACT))
        for name, weights, limit in files:
            seen = theirs(weights, lora, positions, exact=weights == exact_weights)
            tuned = same(seen.tuned, mine.tuned)
            rows.append([
                name, same(seen.base, mine.base), tuned, same(seen.tuned, seen.base), same(seen.tuned, mine.base),
                effect_error(seen, mine),
            ])  # fmt: skip
            targets.append(Target(f"the same token, tuned, {name}", tuned, limit, at_least=True))
    rows.append(["lorakit", None, None, same(mine.tuned, mine.base), None, None])
    columns = [
        "llama.cpp's file", "base, as our base", "tuned, as our tuned", "tuned, as its own base", "tuned, as our base",
        "error of the effect",
    ]  # fmt: skip
    package = f"llama-cpp-python {metadata.version('llama-cpp-python')}"
    title = f"Share of equal most likely tokens at {options.positions} held-out positions, {package}"
    finish(options, title, columns, rows, targets)


if __name__ == "__main__":
    main()
