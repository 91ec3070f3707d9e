"""A frozen 4-bit linear layer in training, forward and backward to x: lorakit, the dense bf16 layer, bitsandbytes.

Run as: python -m bench.linear4bit [--check] [--json FILE] [--rounds 5]
"""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from lorakit.layers import Linear4bit

from .report import Target, arguments, finish
from .timing import SHAPES, medians

TOKENS = {512: 1.12, 2048: 1.05}  # and how many times the dense layer's time each may take


def peer(dense: nn.Linear) -> nn.Module:
    """Return bitsandbytes' layer with the weight of a dense one."""
    layer = bnb.nn.Linear4bit(
        dense.in_features, dense.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.load_state_dict(dense.state_dict())
    result: nn.Module = layer.to("cpu").requires_grad_(False)
    return result


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], object]:
    """Return a call that goes forward, and backward to x."""

    def run() -> None:
        x.grad = None
        layer(x).backward(dy)

    return run


def main() -> None:
    """Measure, print, compare with the targets."""
    parser = arguments(str(__doc__))
    parser.add_argument("--rounds", type=int, default=5, help="times that each call is measured")
    options = parser.parse_args()
    rows, targets = [], []
    for out_features, in_features in SHAPES:
        dense = nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        layers = {"lorakit": Linear4bit.from_linear(dense), "dense": dense, "bitsandbytes": peer(dense).train()}
        for tokens, limit in TOKENS.items():
            x = torch.randn(tokens, in_features, dtype=torch.bfloat16, requires_grad=True)
            dy = torch.randn(tokens, out_features, dtype=torch.bfloat16)
            seen = medians({name: step(layer, x, dy) for name, layer in layers.items()}, options.rounds)
            of_dense, speedup = seen["lorakit"] / seen["dense"], seen["bitsandbytes"] / seen["lorakit"]
            size = f"{out_features} x {in_features}"
            rows.append([size, tokens, *(1e3 * seconds for seconds in seen.values()), of_dense, speedup])
            targets.append(Target(f"{size}, {tokens} tokens: time of the dense layer", of_dense, limit))
            if tokens == 512:
                targets.append(Target(f"{size}, 512 tokens: times bitsandbytes' speed", speedup, 2, at_least=True))
    columns = ["weight", "tokens", "lorakit, ms", "dense, ms", "bitsandbytes, ms", "ours / dense", "bnb / ours"]
    finish(options, "Forward and backward of a frozen NF4 layer in bf16, medians", columns, rows, targets)


if __name__ == "__main__":
    main()
