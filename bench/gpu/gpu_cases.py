"""The operations on 4-bit weights that `bench.gpu` measures, each with its check, its rivals and the bytes it moves.

A case is built for its turn and dropped after it, so that only one holds memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import lorakit_kernels as kernels
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bench.harness import peers
from bench.kernels.dequantize import CODES
from bench.kernels.linear4bit import step
from lorakit import Linear4bit, QuantizedWeight, quantize
from lorakit.quantization import NestedScales

RANK = 16  # of the adapter that products are checked with
CHECKED_TOKENS = 512  # maximum for the check of a layer

Call = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """The device and the sizes of the cases.

    Attributes:
        weights: shapes, (out, in).
        training, decoding, fused: numbers of tokens of a layer's forward and backward pass, of generation, and of the
            products that dequantize as they go.
        rows: tokens of the operations around the weights.
        heads: of rotary embedding; width: of SwiGLU; vocabulary: of the loss; parameters: of the optimizer.
    """

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    weights: tuple[tuple[int, int], ...] = ((4096, 4096), (14336, 4096))
    training: tuple[int, ...] = (512, 2048, 8192)
    decoding: tuple[int, ...] = (1, 16)
    fused: tuple[int, ...] = (64, 256)
    rows: int = 4096
    hidden: int = 4096
    heads: tuple[int, int, int] = (32, 8, 128)  # query heads, key heads, dimensions of each
    width: int = 14336
    vocabulary: int = 128_256
    parameters: int = 2**24

    @staticmethod
    def small(device: torch.device, dtype: torch.dtype) -> Setting:
        """Return the same cases, small enough for Triton's interpreter; their times mean nothing."""
        return Setting(
            device, dtype, weights=((128, 256),), training=(40,), decoding=(1, 16), fused=(20,), rows=16, hidden=64,
            heads=(4, 2, 16), width=128, vocabulary=512, parameters=5000,
        )  # fmt: skip

    def random(self, *size: int) -> Tensor:
        """Return normal numbers of the setting's dtype on its device."""
        return torch.randn(*size, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Attributes:
        check: computes with the kernel and by definition, and returns their difference: as a multiple of the rounding
            bound, or, if `exact`, the number of elements that differ.
        rivals: name -> function that sets up a call and returns it, for lorakit and the others.
        bytes_moved: the least bytes that pass through memory; 0 if memory is not the limit.
    """

    operation: str
    size: str
    check: Callable[[], float]
    exact: bool
    rivals: Mapping[str, Callable[[], Call]] = field(repr=False)
    bytes_moved: float = 0


def cases(setting: Setting) -> Iterator[Case]:
    """Yield the operations of 4-bit weights."""
    for shape in setting.weights:
        weight = setting.random(*shape)
        packed = quantize(weight)
        yield _quantize(weight, packed)
        yield _dequantize(weight, packed)
        for tokens in setting.decoding:
            yield _product(setting, weight, packed, tokens, "linear_4bit, decoding")
        for tokens in setting.fused:
            yield _product(setting, weight, packed, tokens, "linear_4bit")
            yield _product_dx(setting, weight, packed, tokens)
        for tokens in setting.training:
            yield _layer(setting, weight, tokens)


def _quantize(weight: Tensor, packed: QuantizedWeight) -> Case:
    def check() -> float:
        with kernels.use_backend("reference"):
            expected = quantize(weight.cpu())
        return sum(map(differing, _parts(packed), _parts(expected)))

    def by_definition() -> object:
        with kernels.use_backend("reference"):
            return quantize(weight)

    rivals = {
        "lorakit": lambda: partial(quantize, weight), "PyTorch": lambda: by_definition,
        "bitsandbytes": partial(peers.quantized_by_bitsandbytes, weight),
        "torchao": partial(peers.quantized_by_torchao, weight),
    }  # fmt: skip
    return Case("quantize", _size(weight), check, True, rivals, weight.numel() * (2 + CODES))


def _dequantize(weight: Tensor, packed: QuantizedWeight) -> Case:
    def check() -> float:
        with kernels.use_backend("reference"):
            expected = packed.to("cpu").dequantize()
        return differing(packed.dequantize(), expected)

    def by_definition() -> object:
        with kernels.use_backend("reference"):
            return packed.dequantize(out=out)

    out = torch.empty_like(weight)
    rivals = {
        "lorakit": lambda: partial(packed.dequantize, out=out), "PyTorch": lambda: by_definition,
        "bitsandbytes": partial(peers.dequantized_by_bitsandbytes, weight),
        "torchao": partial(peers.dequantized_by_torchao, weight),
    }  # fmt: skip
    return Case("dequantize", _size(weight), check, True, rivals, weight.numel() * (2 + CODES))


def _product(setting: Setting, weight: Tensor, packed: QuantizedWeight, tokens: int, operation: str) -> Case:
    rows, columns = weight.shape
    x, dense, operand = setting.random(tokens, columns), _dense(weight), packed.operand
    u, lora_b = setting.random(tokens, RANK), setting.random(rows, RANK)

    def check() -> float:
        found = kernels.linear_4bit(x, operand, None, [u, lora_b], 0.5)
        return of_bound(found, (x, _values(packed).T), (u / 2, lora_b.T))

    rivals = {
        "lorakit": lambda: partial(kernels.linear_4bit, x, operand, None, [], 1.0),
        "PyTorch": lambda: partial(linear, x, weight),
        "bitsandbytes": lambda: _no_gradient(peers.bitsandbytes_layer(dense).eval(), x),
        "torchao": lambda: _no_gradient(peers.torchao_layer(weight), x),
    }
    moved = weight.numel() * CODES + (x.numel() + tokens * rows) * x.itemsize
    return Case(operation, _size(weight, tokens), check, False, rivals, moved)


def _product_dx(setting: Setting, weight: Tensor, packed: QuantizedWeight, tokens: int) -> Case:
    rows, columns = weight.shape
    dy, operand = setting.random(tokens, rows), packed.operand
    t, lora_a = setting.random(tokens, RANK), setting.random(RANK, columns)

    def check() -> float:
        return of_bound(kernels.linear_4bit_dx(dy, operand, [t, lora_a]), (dy, _values(packed)), (t, lora_a))

    def bitsandbytes() -> Call:
        dequantize = peers.dequantized_by_bitsandbytes(weight)
        return lambda: dy @ dequantize()  # as its backward pass does

    def torchao() -> Call:
        dequantize = peers.dequantized_by_torchao(weight)
        return lambda: dy @ dequantize()

    rivals = {
        "lorakit": lambda: partial(kernels.linear_4bit_dx, dy, operand, []),
        "PyTorch": lambda: partial(torch.matmul, dy, weight),
        "bitsandbytes": bitsandbytes, "torchao": torchao,
    }  # fmt: skip
    moved = weight.numel() * CODES + (dy.numel() + tokens * columns) * dy.itemsize
    return Case("linear_4bit_dx", _size(weight, tokens), check, False, rivals, moved)


def _layer(setting: Setting, weight: Tensor, tokens: int) -> Case:
    rows, columns = weight.shape
    dense, dy = _dense(weight), setting.random(tokens, rows)
    layer = Linear4bit.from_linear(dense)
    x = setting.random(tokens, columns).requires_grad_()

    def check() -> float:
        few = x.detach()[:CHECKED_TOKENS].requires_grad_()
        y = layer(few)
        y.backward(dy[:CHECKED_TOKENS])
        assert few.grad is not None
        values = _values(layer.quantized)
        # PyTorch computes the products of whole layers, and may add rounded partial sums.
        forward = of_bound(y.detach(), (few.detach(), values.T), sums=2.0**-12)
        return max(forward, of_bound(few.grad, (dy[:CHECKED_TOKENS], values), sums=2.0**-12))

    rivals = {
        "lorakit": lambda: step(layer, x, dy), "PyTorch": lambda: step(dense, x, dy),
        "bitsandbytes": lambda: step(peers.bitsandbytes_layer(dense).train(), x, dy),
        "torchao": lambda: step(peers.torchao_layer(weight), x, dy),
    }  # fmt: skip
    return Case("Linear4bit, training", _size(weight, tokens), check, False, rivals)


# ---- parts ---------------------------------------------------------------------------------------------------------


def differing(found: Tensor, expected: Tensor) -> float:
    """Return the number of elements whose bits differ."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[found.itemsize]
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return math.inf
    return float((found.cpu().view(integer) != expected.cpu().view(integer)).sum())


def of_bound(found: Tensor, *products: tuple[Tensor, Tensor], sums: float = 2.0**-20) -> float:
    """Return the largest error of a sum of products, as a multiple of the rounding bound.

    The bound is one unit in the dtype for each product, since a backend may round one before it adds the next, plus
    `sums` times the sum of the factors' magnitudes. The exact products are computed in fp32.
    """
    exact = allowed = torch.zeros((), device=found.device)
    for left, right in products:
        product = left.float() @ right.float()
        exact = exact + product
        allowed = allowed + product.abs() * torch.finfo(found.dtype).eps
        allowed = allowed + left.float().abs() @ right.float().abs() * sums
    return _largest((found.float() - exact).abs() / allowed)


def close(found: Tensor, exact: Tensor, units: int = 1, floor: float | None = None) -> float:
    """Return the largest error as a multiple of the bound: `units` of rounding of an element, plus `floor`.

    By default `floor` is `units` of the root mean square, since backends may round the terms that an element sums.
    """
    unit = units * max(torch.finfo(found.dtype).eps, 1e-5)  # 1e-5: fp32 sums in another order
    least = float(exact.square().mean().sqrt()) * unit if floor is None else floor
    return _largest((found.float() - exact).abs() / (exact.abs() * unit + least))


def _largest(errors: Tensor) -> float:
    """Return the largest error; NaN counts as infinite."""
    return float(errors.nan_to_num(nan=math.inf).max())


def _parts(weight: QuantizedWeight) -> list[Tensor]:
    scales = weight.scales
    assert isinstance(scales, NestedScales)
    return [weight.packed, scales.codes, scales.absmax, scales.offset]


def _values(packed: QuantizedWeight) -> Tensor:
    """Return the values that the definition dequantizes."""
    with kernels.use_backend("reference"):
        return packed.dequantize()


def _dense(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _no_gradient(layer: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    def run() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return run


def _size(weight: Tensor, tokens: int | None = None) -> str:
    shape = f"{weight.shape[0]} x {weight.shape[1]}"
    return shape if tokens is None else f"{shape}, {tokens}"
