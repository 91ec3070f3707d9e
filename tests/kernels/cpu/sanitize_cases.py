"""Every C++ operation on tensors of odd sizes, for a library compiled with AddressSanitizer and UBSan.

Run by test_sanitizers.py, which builds the library and loads the sanitizer's runtime; on its own this finds nothing.

PyTorch allocates exactly the bytes of a tensor, and the sanitizer watches the bytes around each: reading or writing one
byte too many ends the process with a report. That it does is checked last: each operation, told of one element more
than there are, must die of it in a child process. Prints the operations covered.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from lorakit_kernels import AdamWStep, Moment8bit, Weight4bit, cpu
from lorakit_kernels.cpu.loading import DTYPES as NUMBERS
from lorakit_kernels.cpu.loading import SIGNATURES, pointers
from torch import Tensor

from lorakit.quantization import codebook, dynamic_map

COUNTS = (*range(36), 63, 64, 65, 127, 129, 255, 256, 257, 511, 1000, 4097)
MANY = (1 << 18) + 77  # divided among threads
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NF4, TABLE, UNSIGNED = codebook("nf4"), dynamic_map(), dynamic_map(signed=False)
# Which argument of the function in C++ is the number of elements or rows.
COUNT_AT = {
    "quantize_4bit": 2, "quantize_8bit": 2, "dequantize_8bit": 3, "dequantize_4bit": 8, "dequantize_part": 10,
    "linear_4bit": 11, "adamw_8bit": 3, "rms_norm": 4, "rms_norm_backward": 6, "rope": 2, "swiglu": 3,
    "swiglu_backward": 4, "cross_entropy": 2, "drop": 2,
}  # fmt: skip

Call = tuple[Callable[..., object], tuple[Any, ...]]


def name_in_cpp(function: Callable[..., object]) -> str:
    return function.__name__.removesuffix("_out")


def bytes_of(count: int) -> Tensor:
    return torch.randint(256, (count,), dtype=torch.uint8)


def quantized(count: int, block_size: int, dtype: torch.dtype) -> Iterator[Call]:
    """The codecs, of `count` elements."""
    blocks = -(-count // block_size)
    x, out = torch.randn(count).to(dtype), torch.empty(count, dtype=dtype)
    packed, absmax = bytes_of((count + 1) // 2), torch.rand(blocks)
    yield cpu.quantize_8bit, (x, TABLE.boundaries.clone(), block_size)
    yield cpu.dequantize_8bit, (bytes_of(count), TABLE.values.clone(), absmax, block_size)
    if block_size % 2 == 0:
        yield cpu.quantize_4bit, (x, NF4.boundaries.clone(), NF4.order.clone(), block_size)
        weight = Weight4bit(packed, NF4.values.clone(), absmax, block_size, (count,))
        yield cpu.dequantize_4bit_out, (weight, out)
        for nested_size in (1, 3, 256):
            nested = [TABLE.values.clone(), torch.rand(-(-blocks // nested_size)), torch.tensor(0.5)]
            codes = bytes_of(blocks)
            yield cpu.dequantize_4bit_out, (
                weight._replace(absmax=codes, nested=nested, nested_block_size=nested_size), out,
            )  # fmt: skip


def dequantize_part(
    weight: Weight4bit, dtype: torch.dtype, columns: int, rows: tuple[int, int], part: tuple[int, int]
) -> Tensor:
    """Some rows and columns in a tensor of exactly their size; the library's own workspace is larger."""
    out = torch.empty(rows[1] - rows[0], part[1] - part[0], dtype=dtype)
    cpu.library().dequantize_part(
        *pointers(weight), columns, rows[0], len(out), part[0], out.shape[1], out.data_ptr(), NUMBERS[dtype],
        *cpu.threads(),
    )  # fmt: skip
    return out


def multiplied(rows: int, columns: int, dtype: torch.dtype) -> Iterator[Call]:
    """Products with a weight, of few tokens from its codes, and the parts of it that many tokens take."""
    packed, bias = bytes_of(rows * columns // 2), torch.randn(rows).to(dtype)
    for block_size in (64, 128):
        blocks = -(-rows * columns // block_size)
        nested = [TABLE.values.clone(), torch.rand(-(-blocks // 3)), torch.tensor(0.5)]
        for absmax, scales in ((torch.rand(blocks), []), (bytes_of(blocks), nested)):
            weight = Weight4bit(packed, NF4.values.clone(), absmax, block_size, (rows, columns), scales, 3)
            for part in ((0, columns), (2, columns), (0, columns - 2)):
                yield dequantize_part, (weight, dtype, columns, (rows // 2, rows), part)
            for tokens in (0, 1, 2, 7, 17):
                x = torch.randn(tokens, columns).to(dtype)
                yield cpu.linear_4bit, (x, weight, bias if tokens % 2 else None)


def optimized(count: int, dtype: torch.dtype) -> Iterator[Call]:
    """The optimizer's step on `count` parameters."""
    blocks = -(-count // 256)
    parameter, gradient = torch.randn(count).to(dtype), torch.randn(count).to(dtype)
    moments = (
        Moment8bit(bytes_of(count), torch.rand(blocks), table.values.clone(), table.boundaries.clone())
        for table in (TABLE, UNSIGNED)
    )
    yield cpu.adamw_8bit, (parameter, gradient, *moments, AdamWStep(1e-2, 0.9, 0.999, 1e-8, 0.1, 3))


def around_products(rows: int, size: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> Iterator[Call]:
    """The operations between the matrix products, of `rows` rows of `size` elements; heads have twice as many."""
    x, weight = torch.randn(rows, size).to(dtype), torch.randn(size).to(weight_dtype)
    dy = torch.randn(rows, size).to(torch.promote_types(dtype, weight_dtype))
    yield cpu.rms_norm, (x, weight, 1e-5)
    yield cpu.rms_norm_backward, (dy, x, weight, torch.rand(rows, 1))
    yield cpu.cross_entropy, (x.clone(), torch.arange(len(x)) % x.shape[1], True)
    yield cpu.drop, (x, torch.tensor(rows), 0.4)
    yield cpu.swiglu, (x, x.clone())
    yield cpu.swiglu_backward, (x.clone(), x, x.clone())
    q, k = (torch.randn(rows, heads, 2 * size).to(dtype) for heads in (3, 1))
    tables = torch.randn(rows, 2 * size).to(dtype), torch.randn(rows, 2 * size).to(dtype)
    yield cpu.rope, (q, k, *tables, True)
    yield cpu.rope, (q.transpose(0, 1).contiguous().transpose(0, 1), k, *tables)


def all_calls() -> Iterator[Call]:
    for dtype, weight_dtype in (*zip(DTYPES, DTYPES, strict=True), *product(DTYPES[1:], DTYPES[:1])):
        for rows, size in (*product((1, 3), (*range(1, 36), 63, 64, 65, 577)), (521, 577)):
            yield from around_products(rows, size, dtype, weight_dtype)
    for dtype, count in product(DTYPES, (*COUNTS, MANY)):
        for block_size in (2, 7, 32, 48, 64, 256):
            yield from quantized(count, block_size, dtype)
        yield from optimized(count, dtype)
    for dtype, rows, columns in product(DTYPES, (1, 3, 4, 9), (64, 128, 192, 2112, 16448)):
        yield from multiplied(rows, columns, dtype)
    yield from multiplied(2055, 128, torch.bfloat16)


def is_reported(name: str) -> bool:
    """Whether the operation, told in a child process of one element more than there are, dies of it with a report."""
    library, position = cpu.library(), COUNT_AT[name]
    real = getattr(library, name)

    def told_of_one_more(*arguments: Any) -> None:
        real(*arguments[:position], arguments[position] + 1, *arguments[position + 1 :])

    with tempfile.TemporaryFile("w+") as report:
        child = os.fork()
        if child == 0:
            os.dup2(report.fileno(), 2)
            setattr(library, name, told_of_one_more)
            small = (
                *quantized(256, 64, torch.float32),
                *multiplied(4, 64, torch.float32),
                *optimized(256, torch.float32),
                *around_products(4, 64, torch.float32, torch.float32),
            )
            for function, arguments in small:
                if name_in_cpp(function) == name:
                    function(*arguments)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        report.seek(0)
        return status != 0 and "AddressSanitizer: heap-buffer-overflow" in report.read()


def main() -> None:
    torch.manual_seed(0)
    covered = set()
    for function, arguments in all_calls():
        function(*arguments)
        covered.add(name_in_cpp(function))
    assert covered == set(SIGNATURES) == set(COUNT_AT), f"not covered: {set(SIGNATURES) - covered}"
    for name in sorted(covered):
        assert is_reported(name), f"{name} beyond the end of a tensor is not reported"
    print(*sorted(covered))


if __name__ == "__main__":
    main()
