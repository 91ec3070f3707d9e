"""A frozen 4-bit linear layer in training, forward and backward to x: lorakit, the dense bf16 layer, the peers.

The limit is the dense layer's time: its two products have to be computed for any storage of the weight.

Run as: python -m bench.linear4bit [--check] [--json FILE] [--plot FILE] [--rounds 5]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.harness import peers
from bench.harness.plot import Picture
from bench.harness.report import Target, arguments, finish, milliseconds, ratio
from bench.harness.timing import SHAPES, Calls, medians, size_of
from lorakit.layers import Linear4bit

TOKENS = {512: 1.12, 2048: 1.05}  # tokens -> the largest allowed multiple of the dense layer's time
SIZES = tuple((shape, tokens) for shape in SHAPES for tokens in TOKENS)
CONTENDERS = ("lorakit", "bitsandbytes", "torchao", "dense")


def layers(shape: tuple[int, int], training: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the layers (out, in), each with the same weight, by contender."""
    out_features, in_features = shape
    dense = nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    result: dict[str, Callable[[Tensor], Tensor]] = {"lorakit": Linear4bit.from_linear(dense)}
    if peers.has("bitsandbytes"):
        result["bitsandbytes"] = peers.bitsandbytes_layer(dense).train(training)
    if peers.has("torchao"):
        result["torchao"] = peers.torchao_layer(dense.weight)
    return result | {"dense": dense}


def step(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Callable[[], object]:
    """Return a call of the forward pass and the backward pass to x."""

    def run() -> None:
        x.grad = None
        layer(x).backward(dy)

    return run


def calls(shape: tuple[int, int], tokens: int) -> Calls:
    """Return the calls that take turns, by contender."""
    x = torch.randn(tokens, shape[1], dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(tokens, shape[0], dtype=torch.bfloat16)
    return {name: step(layer, x, dy) for name, layer in layers(shape, training=True).items()}


def main() -> None:
    """Measure, print, compare with the targets."""
    parser = arguments(str(__doc__), plots=True)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each call")
    options = parser.parse_args()
    rows, targets, picture = [], [], Picture("milliseconds")
    for shape, tokens in SIZES:
        seen = medians(calls(shape, tokens), options.rounds)
        seen["limit"] = seen["dense"]
        of_dense, speedup = seen["lorakit"] / seen["dense"], ratio(seen, "bitsandbytes", "lorakit")
        size = size_of(shape)
        rows.append([size, tokens, *(milliseconds(seen, name) for name in CONTENDERS), of_dense, speedup])
        group = f"{size}, {tokens} tokens"
        picture.add(group, seen, CONTENDERS, ("limit",))
        targets.append(Target(f"{group}: time of the dense layer", of_dense, TOKENS[tokens]))
        if tokens == 512 and speedup is not None:
            targets.append(Target(f"{group}: times bitsandbytes' speed", speedup, 2, at_least=True))
    columns = ["weight", "tokens", *CONTENDERS, "ours / dense", "bnb / ours"]
    title = "Forward and backward of a frozen NF4 layer in bf16, medians in ms"
    finish(options, title, columns, rows, targets, picture)


if __name__ == "__main__":
    main()
