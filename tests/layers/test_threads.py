"""Eight Python threads at once through the kernels and the 4-bit layers: each gets what it gets alone, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import lorakit_kernels as kernels
import pytest
import torch
from lorakit_kernels import STATE_BLOCK_SIZE, AdamWStep, Moment8bit
from torch import Tensor

from lorakit.layers import AdapterSpec, Linear4bit, LoRALinear, RMSNorm, apply_rope
from lorakit.quantization import dynamic_map, quantize

THREADS, ROUNDS = 8, 5
Work = Callable[[], list[Tensor]]


@pytest.fixture(autouse=True)
def two_threads_in_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def quantized(rows: int, columns: int, quant_type: str, dtype: torch.dtype) -> Work:
    weight = torch.randn(rows, columns).to(dtype)

    def work() -> list[Tensor]:
        made = quantize(weight, quant_type)
        return [made.packed, made.absmax, made.dequantize(dtype)]

    return work


def optimized(count: int) -> Work:
    signed, unsigned = ((table.values, table.boundaries) for table in (dynamic_map(), dynamic_map(signed=False)))
    codes, scales = torch.randint(256, (count,)).byte(), torch.rand(-(-count // STATE_BLOCK_SIZE))
    parameter, gradient = torch.randn(2, count)

    def work() -> list[Tensor]:
        written = [parameter.clone(), codes.clone(), scales.clone(), codes.clone(), scales.clone()]
        first, second = Moment8bit(*written[1:3], *signed), Moment8bit(*written[3:], *unsigned)
        kernels.adamw_8bit(written[0], gradient, first, second, AdamWStep(1e-2, 0.9, 0.999, 1e-8, 0.1, 3))
        return written

    return work


def trained(layer: torch.nn.Module, features: int, tokens: int, dtype: torch.dtype) -> Work:
    given = torch.randn(tokens, features).to(dtype)

    def work() -> list[Tensor]:
        x = given.clone().requires_grad_()
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trainable(layer)])]

    return work


def trainable(layer: torch.nn.Module) -> list[Tensor]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def around_the_layers(tokens: int, heads: int, size: int) -> Work:
    """Norm, rotation and activation, forward and backward."""
    given = torch.randn(tokens, heads * size).bfloat16()
    cos, sin = torch.randn(2, tokens, size).bfloat16()
    norm = RMSNorm(heads * size, 1e-5).bfloat16().requires_grad_(False)

    def work() -> list[Tensor]:
        x = given.clone().requires_grad_()
        y = norm(x).view(tokens, heads, size)
        q, k = apply_rope(y, y[:, :1], cos, sin)
        z = kernels.swiglu(q, y) + k
        return [z.detach(), *torch.autograd.grad(z.float().square().sum(), x)]

    return work


def linear(inputs: int, outputs: int) -> Linear4bit:
    return Linear4bit(quantize(torch.randn(outputs, inputs) / inputs**0.5))


def adapted(inputs: int, outputs: int) -> LoRALinear:
    layer = LoRALinear(linear(inputs, outputs))
    layer.add("a", AdapterSpec(4, 0.5, neutral_start=False))
    layer.active = ("a",)
    return layer


def test_results_are_those_of_one_thread() -> None:
    torch.manual_seed(0)
    works = [
        quantized(521, 640, "nf4", torch.bfloat16),  # large enough for the kernels to start threads themselves
        quantized(33, 70, "fp4", torch.float32),
        optimized(300_001),
        trained(linear(640, 512), 640, 17, torch.bfloat16),
        trained(linear(640, 512), 640, 9, torch.float32),  # the same workspace, of another dtype
        trained(linear(64, 96), 64, 5, torch.float32),  # and smaller
        trained(adapted(640, 512), 640, 17, torch.bfloat16),
        around_the_layers(300, 9, 128),
    ]
    expected = [work() for work in works]
    together = threading.Barrier(THREADS)

    def wrong(thread: int) -> set[int]:
        together.wait()
        found = set()
        for turn in range(ROUNDS * len(works)):
            index = (thread + turn) % len(works)  # every thread is at another piece of work
            results = works[index]()
            if not all(torch.equal(a, b) for a, b in zip(results, expected[index], strict=True)):
                found.add(index)
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(wrong, range(THREADS))) == [set()] * THREADS
