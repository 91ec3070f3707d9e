"""A 4-bit linear layer in generation, 1 and 16 tokens: lorakit, the dense bf16 layer, the peers.

bitsandbytes repacks its weight and rounds its scales at the first call in eval mode, which is not counted.

The limit at one token is the time to read the packed codes: all threads sum them as 64-bit integers, in the same turns.
At 16 tokens it is the dense layer's time. That layer computes the same product and reads a weight four times as large.
A kernel that multiplies codes as it reads them may go below that limit.

torchao has no kernel for few tokens. It dequantizes the whole weight, in 10 to 60 times the time of the others, and
would empty the caches for them. So its turns come after theirs.

Run as: python -m bench.decode [--check] [--json FILE] [--plot FILE] [--rounds 31]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness.plot import Picture
from bench.harness.report import Target, arguments, finish, milliseconds, ratio
from bench.harness.timing import SHAPES, Calls, medians, size_of
from bench.kernels.linear4bit import layers

SIZES = tuple((shape, tokens) for shape in SHAPES for tokens in (1, 16))
APART = ("torchao",)
CONTENDERS = ("lorakit", "bitsandbytes", "torchao", "dense", "read the codes")


def calls(shape: tuple[int, int], tokens: int) -> Calls:
    """Return the calls that take turns, by contender."""
    x = torch.randn(tokens, shape[1], dtype=torch.bfloat16)
    codes = torch.randint(256, (shape[0] * shape[1] // 16,))  # 64-bit integers of the codes' size
    result: Calls = {name: _generating(layer, x) for name, layer in layers(shape, training=False).items()}
    return result | {"read the codes": codes.sum}


def _generating(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.inference_mode():
            return layer(x)

    return run


def main() -> None:
    """Measure, print, compare with the targets."""
    parser = arguments(str(__doc__), plots=True)
    parser.add_argument("--rounds", type=int, default=31, help="rounds of each call")
    options = parser.parse_args()
    rows, targets, picture = [], [], Picture("milliseconds")
    for shape, tokens in SIZES:
        turns = calls(shape, tokens)
        apart = {name: turns.pop(name) for name in APART if name in turns}
        seen = medians(turns, options.rounds) | medians(apart, rounds=3)
        seen["limit"] = seen["read the codes" if tokens == 1 else "dense"]
        of_dense, of_peer = seen["dense"] / seen["lorakit"], ratio(seen, "bitsandbytes", "lorakit")
        size = size_of(shape)
        names = (*CONTENDERS[:-1], "limit")
        rows.append([size, tokens, *(milliseconds(seen, name) for name in names), of_dense, of_peer])
        group = f"{size}, {tokens} token{'s' * (tokens > 1)}"
        picture.add(group, seen, CONTENDERS[:-1], ("limit",))
        least = 2.5 if tokens == 1 else 1.0
        targets.append(Target(f"{group}: times the dense layer's speed", of_dense, least, at_least=True))
        if of_peer is not None:
            targets.append(Target(f"{group}: times bitsandbytes' speed", of_peer, 1.0, at_least=True))
    columns = ["weight", "tokens", *CONTENDERS[:-1], "limit", "dense / ours", "bnb / ours"]
    finish(options, "One NF4 layer in bf16, medians in ms", columns, rows, targets, picture)


if __name__ == "__main__":
    main()
