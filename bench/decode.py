"""A 4-bit linear layer in generation, 1 and 16 tokens: lorakit, the dense bf16 layer, bitsandbytes' repacked eval path.

bitsandbytes repacks its weight at the first call in eval mode, which is not counted, and then rounds its scales.

Run as: python -m bench.decode [--check] [--json FILE] [--rounds 31]
"""

from __future__ import annotations

import torch
from torch import nn

from lorakit.layers import Linear4bit

from .linear4bit import peer
from .report import Target, arguments, finish
from .timing import SHAPES, medians


@torch.inference_mode()
def main() -> None:
    """Measure, print, compare with the targets."""
    parser = arguments(str(__doc__))
    parser.add_argument("--rounds", type=int, default=31, help="times that each call is measured")
    options = parser.parse_args()
    rows, targets = [], []
    for out_features, in_features in SHAPES:
        dense = nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        layers = {"lorakit": Linear4bit.from_linear(dense), "dense": dense, "bitsandbytes": peer(dense).eval()}
        for tokens in (1, 16):
            x = torch.randn(tokens, in_features, dtype=torch.bfloat16)
            calls = {name: lambda layer=layer, x=x: layer(x) for name, layer in layers.items()}
            seen = medians(calls, options.rounds)
            of_dense, of_peer = seen["dense"] / seen["lorakit"], seen["bitsandbytes"] / seen["lorakit"]
            size = f"{out_features} x {in_features}"
            rows.append([size, tokens, *(1e3 * seconds for seconds in seen.values()), of_dense, of_peer])
            least = 2.5 if tokens == 1 else 1.0
            targets.append(Target(f"{size}, {tokens}: times the dense layer's speed", of_dense, least, at_least=True))
            targets.append(Target(f"{size}, {tokens}: times bitsandbytes' speed", of_peer, 1.0, at_least=True))
    columns = ["weight", "tokens", "lorakit, ms", "dense, ms", "bitsandbytes, ms", "dense / ours", "bnb / ours"]
    finish(options, "One NF4 layer in bf16, medians", columns, rows, targets)


if __name__ == "__main__":
    main()
