"""Every Triton kernel as the library launches it, for `bench.static_gpu` to compile: types, constants, warps, bytes.

The bytes that a kernel moves are counted from its arguments' types: each tensor once for every pass over it, divided by
the number of weights, or elements, that the kernel computes. Tensors that all programs share (codebooks, boundaries, a
norm's weight) stay in the caches and are not counted. In a product, x and y count once, for a weight of 4096 x 4096.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import triton
from lorakit_kernels.triton import decode, dequantize, quantize, tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

linear = importlib.import_module("lorakit_kernels.triton.linear_4bit")  # the package has a function of this name

BLOCK, NESTED_BLOCK = 64, 256
FEATURES = 4096  # rows and columns of the weight in products
PRODUCT_TYPES = {
    "x": "*bf16", "dy": "*bf16", "y": "*bf16", "dx": "*bf16", "bias": "*bf16",
    "u": "*bf16", "lora_b": "*bf16", "t": "*bf16", "lora_a": "*bf16", "packed": "*i32", "codebook": "*fp32",
    "absmax": "*u8", "nested_codebook": "*fp32", "nested_absmax": "*fp32", "nested_offset": "*fp32", "scaling": "fp32",
}  # fmt: skip
CODEC_TYPES = {
    "packed": "*i32", "x": "*bf16", "out": "*bf16", "codebook": "*fp32", "absmax": "*fp32", "boundaries": "*fp32",
    "order": "*u8", "codes": "*i32", "nested_codebook": "*fp32", "nested_absmax": "*fp32", "nested_offset": "*fp32",
}  # fmt: skip
WITHOUT_NESTED = {"NESTED": 0, "nested_codebook": None, "nested_absmax": None, "nested_offset": None}
MOVED_IN_TRAINING: dict[str, Callable[[Mapping[str, int]], dict[str, float]]] = {  # module -> elements, by argument
    "rms_norm": lambda sizes: {"x": 1, "y": 1, "dy": 1, "dx": 1, "rstd": 1 / sizes["COLUMNS"]},
    "rope": lambda sizes: _rope_moves(sizes),
    "swiglu": lambda sizes: dict.fromkeys(("gate", "up", "y", "dy", "dgate", "dup"), 1),
    "dropout": lambda sizes: {"x": 1, "y": 1},
    "cross_entropy": lambda sizes: {"logits": 3 if sizes["WITH_GRADIENT"] else 1},  # read twice, and written
    "adamw_8bit": lambda sizes: {
        "parameter": 2, "gradient": 1, "first": 2, "second": 2,
        "first_absmax": 2 / sizes["BLOCK"], "second_absmax": 2 / sizes["BLOCK"],
    },
}  # fmt: skip
SCALES = {"absmax": 1 / BLOCK, "nested_absmax": 1 / BLOCK / NESTED_BLOCK}


@dataclass(frozen=True)
class Case:
    """A kernel for bf16, blocks of 64 and large tensors.

    Attributes:
        source: the source that Triton compiles.
        per_program: weights or elements that a program computes, once or in each step of its loops.
        bytes_moved: bytes of global memory moved a weight or element.
        options: options of the launch.
        in_loops: whether only the loops' instructions count, instead of the whole kernel's.
        is_product: whether it multiplies on tensor cores, in the longest loop.
    """

    name: str
    source: ASTSource
    per_program: int
    bytes_moved: float
    options: Mapping[str, object]
    in_loops: bool = False
    is_product: bool = False

    def compile(self, target: GPUTarget) -> Any:
        """Compile for a target."""
        return triton.compile(self.source, target=target, options=dict(self.options))


def cases(lanes: int) -> Iterator[Case]:
    """Yield every kernel, with the default tiles for warps of `lanes` threads."""
    yield from _codecs()
    yield from _products(lanes)
    yield from _training()


def _codecs() -> Iterator[Case]:
    kernel, size = dequantize.dequantize_4bit_kernel, {"BLOCK": BLOCK, "WORDS": dequantize.WORDS}
    shared: dict[str, Any] = {
        "moved": {"packed": 1 / 8, "out": 1} | SCALES, "weights": dequantize.WORDS * 8, "warps": dequantize.WARPS
    }  # fmt: skip
    yield _codec("dequantize_4bit", kernel, {}, size | WITHOUT_NESTED, **shared)
    yield _codec("dequantize_4bit nested", kernel, {"absmax": "*u8"}, size | {"NESTED": 256}, **shared)
    yield _codec(
        "dequantize_8bit", dequantize.dequantize_8bit_kernel, {"codes": "*u8", "out": "*fp32"},
        {"BLOCK": 256, "VALUES": dequantize.VALUES_8BIT},
        moved={"codes": 1, "absmax": 1 / 256, "out": 1}, weights=dequantize.VALUES_8BIT, warps=4,
    )  # fmt: skip
    yield _codec(
        "quantize_4bit", quantize.quantize_kernel, {},
        {"BLOCK": BLOCK, "WIDTH": BLOCK, "ROWS": quantize.VALUES // BLOCK, "TABLE": 16},
        moved={"x": 1, "codes": 1 / 8, "absmax": 1 / BLOCK}, weights=quantize.VALUES, warps=quantize.WARPS,
    )  # fmt: skip
    yield _codec(
        "quantize_8bit", quantize.quantize_kernel, {"codes": "*u8", "x": "*fp32"},
        {"order": None, "BLOCK": 256, "WIDTH": 256, "ROWS": quantize.VALUES // 256, "TABLE": 256},
        moved={"x": 1, "codes": 1, "absmax": 1 / 256}, weights=quantize.VALUES, warps=quantize.WARPS,
    )  # fmt: skip


def _codec(
    name: str, kernel: Any, types: Mapping[str, str], constants: Mapping[str, object], *,
    moved: Mapping[str, float], weights: int, warps: int,
) -> Case:  # fmt: skip
    source = _source(kernel, CODEC_TYPES | types, constants)
    return Case(name, source, weights, _bytes(source, moved), {"num_warps": warps, "enable_fp_fusion": False})


def _products(lanes: int) -> Iterator[Case]:
    kernels = {
        "decode": (decode.decode_kernel, tiles.DECODE_TOKENS, ("x", "y")),
        "linear_4bit": (linear.linear_kernel, tiles.FUSED_TOKENS, ("x", "y")),
        "linear_4bit_dx": (linear.linear_dx_kernel, tiles.FUSED_TOKENS, ("dy", "dx")),
    }
    for family, (kernel, tokens, activations) in kernels.items():
        tile = tiles.default(family, lanes)
        constants: dict[str, object] = {
            "FEATURES": tile.features, "STEP": tile.step, "BLOCK": BLOCK, "RANK_STEP": 16, "NESTED": NESTED_BLOCK,
            "ONE_SCALE": BLOCK % (tile.features if family == "linear_4bit_dx" else tile.step) == 0,
        }  # fmt: skip
        if family != "decode":
            constants["TOKENS"] = tile.tokens
        source = _source(kernel, PRODUCT_TYPES, constants)
        moved = {"packed": 1 / 8} | SCALES | dict.fromkeys(activations, tokens / FEATURES)
        options, weights = tile.options(lanes), tile.features * tile.step
        yield Case(f"{family} nested", source, weights, _bytes(source, moved), options, is_product=True)


def _training() -> Iterator[Case]:
    """Yield the kernels of a training step; their modules list the arguments that they are compiled for."""
    for name, moved in MOVED_IN_TRAINING.items():
        module = importlib.import_module(f"lorakit_kernels.triton.{name}")  # the package has functions of these names
        for label, source in module.sources():
            sizes = _constants(source)
            options = {"num_warps": 8 if name == "cross_entropy" else 4, "enable_fp_fusion": name != "adamw_8bit"}
            elements = math.prod(size for key, size in sizes.items() if key != "WITH_GRADIENT")
            if name == "rope":
                elements = _heads(sizes) * 2 * sizes["HALF"]
            elements *= 4 if name == "dropout" else 1  # elements of a counter
            moves = _bytes(source, moved(sizes))
            yield Case(label, source, elements, moves, options, in_loops=name == "cross_entropy")


def _rope_moves(sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the moves of rotary embedding; a token's row of each table, 2 * HALF elements, serves all its heads."""
    heads = _heads(sizes)
    q, k = sizes["HEADS"] / heads, sizes["KV_HEADS"] / heads
    return {"q": q, "turned_q": q, "k": k, "turned_k": k, "cos": 0.5 / heads, "sin": 0.5 / heads}  # it reads half


def _heads(sizes: Mapping[str, int]) -> int:
    return sizes["HEADS"] + sizes["KV_HEADS"]


def _source(kernel: Any, types: Mapping[str, str], constants: Mapping[str, object]) -> ASTSource:
    """Return a kernel's source with pointers and sizes that are multiples of 16, as in real layers."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name] != "constexpr" and not signature[name].startswith("fp")
    }
    return ASTSource(kernel, signature, dict(constants), aligned)


def _constants(source: ASTSource) -> dict[str, int]:
    """Return name -> size of the constants that a source is compiled for; Triton keys them by position."""
    return {source.fn.arg_names[place[0]]: int(value) for place, value in source.constants.items()}


def _bytes(source: ASTSource, moved: Mapping[str, float]) -> float:
    """Return the sum over the pointers of the type's bytes times the number of elements moved."""
    sizes = {"*bf16": 2, "*fp32": 4, "*i32": 4, "*u8": 1}
    return sum(sizes[kind] * moved.get(name, 0) for name, kind in source.signature.items() if kind in sizes)
