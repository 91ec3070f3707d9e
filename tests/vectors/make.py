"""Write the conformance vectors of the 4-bit codec: inputs, bytes and outputs to check an implementation by.

The expected values are computed here element by element in numpy, straight from docs/reference/quantization-format.md,
without lorakit's code; a test then holds lorakit to them.

Run as: python tests/vectors/make.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent

NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], dtype=np.float32)  # fmt: skip
FP4_HALF = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=np.float32) / np.float32(12)
FP4 = np.concatenate([FP4_HALF, np.float32(0) - FP4_HALF])
CODEBOOKS = {"nf4": NF4, "fp4": FP4}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dynamic_map() -> np.ndarray:
    """The signed 8-bit dynamic map, 256 fp32 values, ascending."""
    positive: list[np.float32] = []
    for decade in range(7):
        count, start, end = 2**decade, np.float32(0.1), np.float32(1)
        step, index = np.float64((end - start) / np.float32(count)), np.arange(count + 1)
        upward, downward = np.float64(start) + step * index, np.float64(end) - step * (count - index)
        edges = np.where(index < (count + 1) // 2, upward, downward).astype(np.float32)  # each rounded once
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        positive += list(np.float32(10.0 ** (decade - 6)) * middles)
    return np.sort(np.array([*positive, *(-x for x in positive), 0, 1], dtype=np.float32))


def quantize(x: np.ndarray, values: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of fp32 elements, by the definition."""
    order = [int(np.flatnonzero(values == value)[0]) for value in np.unique(values)]  # lowest code of equal values
    ascending = values[order]
    boundaries = (ascending[1:] + ascending[:-1]) / np.float32(2)
    codes, scales = np.zeros(len(x), np.uint8), []
    with np.errstate(all="ignore"):
        for start in range(0, len(x), block_size):
            block = x[start : start + block_size]
            absmax = np.abs(block).max()
            scales.append(absmax)
            reciprocal = np.float32(1) / absmax
            for i, element in enumerate(block):
                scaled = np.float32(0) if element == 0 else element * reciprocal
                codes[start + i] = order[int((boundaries < scaled).sum())]
    return codes, np.array(scales, np.float32)


def dequantize(codes: np.ndarray, values: np.ndarray, scales: np.ndarray, block_size: int) -> np.ndarray:
    """Values of codes, fp32."""
    return values[codes] * np.repeat(scales, block_size)[: len(codes)]


def contents(quant_type: str, block_size: int) -> dict[str, torch.Tensor]:
    """What to quantize: name -> fp32 tensor, to be rounded to the case's dtype."""
    generator = torch.Generator().manual_seed(block_size)
    values = CODEBOOKS[quant_type]
    ascending = np.unique(values)
    ties = np.concatenate([(ascending[1:] + ascending[:-1]) / np.float32(2), [1.0], ascending])
    found = {
        "matrix": torch.randn(5, 130, generator=generator) * torch.tensor([[1.0], [30.0], [0.01], [1e-6], [5.0]]),
        "odd": torch.randn(block_size + 3 if block_size <= 256 else 37, generator=generator),
        "ties": torch.tensor(ties, dtype=torch.float32),
        "zeros": torch.cat([torch.tensor([0.0, -0.0] * (block_size // 2)), torch.tensor([0.5, -0.0, 0.0, -0.25])]),
        "subnormal": torch.tensor([2.0**-149, -(2.0**-140), 0.0, 2.0**-127, -(2.0**-130)]),
        "cube": torch.randn(2, 3, 7, generator=generator),
        "empty": torch.zeros(0),
    }
    return found if block_size == 64 else {name: found[name] for name in ("matrix", "odd", "zeros")}


def main() -> None:
    """Write one file per 4-bit type, from the inputs of a file that is there: draws differ between processors."""
    dynamic = dynamic_map()
    for quant_type, values in CODEBOOKS.items():
        path = FOLDER / f"{quant_type}.safetensors"
        stored = {key: tensor.clone() for key, tensor in load_file(path).items()} if path.exists() else {}
        tensors: dict[str, torch.Tensor] = {}
        for block_size in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            for dtype_name, dtype in DTYPES.items():
                if block_size > 64 and dtype_name != "bf16":
                    continue
                for content, tensor in contents(quant_type, block_size).items():
                    key = f"{content}.{dtype_name}.{block_size}"
                    source = stored.get(f"{key}.input", tensor.to(dtype))
                    codes, scales = quantize(source.reshape(-1).float().numpy(), values, block_size)
                    padding = np.array([0 if quant_type == "fp4" else 7] * (len(codes) % 2), np.uint8)
                    padded = np.concatenate([codes, padding])
                    offset = np.float32(scales.astype(np.float64).mean()) if len(scales) else np.float32(0)
                    scale_codes, nested = quantize(scales - offset, dynamic, 256)
                    expanded = dequantize(scale_codes, dynamic, nested, 256) + offset
                    arrays = {
                        "packed": padded[0::2] << 4 | padded[1::2],
                        "absmax": scales,
                        "values": dequantize(codes, values, scales, block_size),
                        "absmax_codes": scale_codes,
                        "nested_absmax": nested,
                        "nested_offset": np.array([offset]),
                        "double_quant_values": dequantize(codes, values, expanded, block_size),
                    }
                    tensors[f"{key}.input"] = source.contiguous()
                    tensors |= {f"{key}.{name}": torch.from_numpy(array.copy()) for name, array in arrays.items()}
        save_file(tensors, path)


if __name__ == "__main__":
    main()
