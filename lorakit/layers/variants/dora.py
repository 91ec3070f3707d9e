"""DoRA: LoRA trains each row's direction, a vector its length (Liu et al. 2024, arXiv:2402.09353, eq. 5 and 6).

    W' = m * (W + s B A) / n        n_i = ||row i of W + s B A||, a constant to the gradient (section 4.3)

A DoRA adapter is thus plain LoRA with the gain g = m / n on each output. The paper writes W as (in, out) and speaks of
columns, which are rows of PyTorch's weight. The norms come from W, A and B without the product B A:

    n_i² = ||w_i||² + 2 s b_i · (A w_i) + s² b_i (A Aᵀ) b_iᵀ
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from lorakit_kernels import is_transformed
from torch import Tensor

from .variant import AttachedAdapter, FrozenWeight, KeptGain, Variant

_ELEMENTS = 1 << 17  # weights that are squared at a time, 1 MiB in float64


class DoRA(Variant):
    """A further trained vector (out_features,): the magnitude m of each row, which starts at the row's norm."""

    name = "dora"
    trained = ("lora_magnitude_vector",)
    has_gain = True
    row_lengths = "lora_magnitude_vector"

    title = "DoRA"
    meaning = "DoRA, which scales each row of base and update together"
    scales = "scales the rows"
    not_low_rank = (
        "is a DoRA adapter: its change of the base, m (W + s BA) / |W + s BA| - W, is not of low rank; merge it into "
        "the base model, or train plain LoRA"
    )
    further = "magnitudes (DoRA)"
    switch = "use_dora"
    peft_type = "LORA"
    old_endings = MappingProxyType({"lora_magnitude_vector.weight": "lora_magnitude_vector"})  # of PEFT before 0.11

    def start(self, layer: FrozenWeight, adapter: AttachedAdapter) -> dict[str, Tensor]:
        norms = row_norms(layer, *self.factors(adapter), torch.float32)
        return {"lora_magnitude_vector": norms.to(adapter.lora_A.dtype)}

    def gain(self, layer: FrozenWeight, adapter: AttachedAdapter, dtype: torch.dtype) -> Tensor:
        magnitude = adapter.parameters["lora_magnitude_vector"]
        # Decoding token by token, the norms would cost as much as the layer. So without gradient the gain is kept while
        # its sources stay the same. They are compared by value, since a write to `.data` changes no version.
        sources, kept = (magnitude, adapter.lora_A, adapter.lora_B), adapter.kept_gain
        adapter.kept_gain = None
        keeps = not torch.is_grad_enabled() and not is_transformed()
        if keeps and kept is not None:
            is_same = (kept.dtype, kept.scaling) == (dtype, adapter.scaling)
            if is_same and all(map(_is_equal, sources, kept.sources)):
                adapter.kept_gain = kept
                return kept.gain
        norms = row_norms(layer, *self.factors(adapter), dtype)
        gain = magnitude / norms.masked_fill(norms == 0, 1)  # a row of zeros, whose magnitude is 0, stays zero
        if keeps:
            own = tuple(source.detach().clone() for source in sources)
            adapter.kept_gain = KeptGain(dtype, adapter.scaling, gain, own)
        return gain

    def file_shape(self, layer: FrozenWeight, table: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in a file: a convolution's magnitudes are (1, out_features, 1, ...)."""
        kernel = layer.matrix_shapes(1)[0][2:]
        return (1, *shape, *(1 for _ in kernel)) if kernel and table in self.trained else shape

    def held_bytes(self, out_features: int) -> int:
        """Return the bytes of ||w_i||² of the rows, in fp64."""
        return 8 * out_features

    def flops(self, rank: int, in_features: int, out_features: int) -> int:
        """Return the FLOPs of the norms of the rows of W + s B A: A Wᵀ, A Aᵀ and B (A Aᵀ)."""
        return 2 * rank * (out_features * in_features + rank * in_features + rank * out_features)


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@torch.no_grad()
def row_norms(layer: FrozenWeight, up: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:
    """Return n, the norms of the rows of W + up @ down: (out_features,), fp32 or better.

    Args:
        up: (out_features, r), with the scaling.
        down: (r, in_features).
        dtype: dtype of the product of A with the base weight, in which the layer computes.
    """
    # Forward-mode differentiation goes on without gradient, unless a tensor is detached.
    up, down = up.detach().to(torch.promote_types(up.dtype, torch.float32)), down.detach().to(dtype)
    across = layer.project(down).to(up.dtype)  # (r, out): A Wᵀ
    down = down.to(up.dtype)
    squares = squared_rows(layer).to(up.dtype) + ((2 * across.T + up @ (down @ down.T)) * up).sum(1)
    return squares.clamp_(min=0).sqrt_()


def squared_rows(layer: FrozenWeight) -> Tensor:
    """Return ||w_i||² of the base weight's rows, (out_features,) float64, computed once per base weight."""
    kept = layer.kept_of_base.get("squared_rows")
    if kept is None or kept.device != layer.device or is_transformed():
        # A few rows at a time: whole weights, one after another, would fragment the heap.
        step = max(1, _ELEMENTS // layer.in_features)
        starts = range(0, layer.out_features, step)
        chunks = (layer.base_rows(slice(first, min(first + step, layer.out_features))) for first in starts)
        kept = torch.cat([rows.double().square().sum(1) for rows in chunks])
        if not is_transformed():  # the tensors of a transform do not outlive it
            layer.kept_of_base["squared_rows"] = kept
    return kept
