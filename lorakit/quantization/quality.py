"""The error of a quantized weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ShapeError


@dataclass(frozen=True)
class QuantizationError:
    """Distance of the quantized values from the source.

    Attributes:
        mse: mean squared error.
        max: largest absolute error.
        relative_frobenius: ‖error‖ / ‖source‖; 0 if both are 0.
        snr_db: 10 log10(‖source‖² / ‖error‖²), decibels; inf if there is no error.
        worst_row: index of the row (first dimension) with the largest relative error; None for an empty tensor.
        worst_row_relative: that row's ‖error‖ / ‖source‖.
    """

    mse: float
    max: float
    relative_frobenius: float
    snr_db: float
    worst_row: int | None
    worst_row_relative: float


def quantization_error(values: Tensor, source: Tensor) -> QuantizationError:
    """Compare quantized values with their source. Sums are taken in fp64.

    Args:
        values: dequantized values, any shape.
        source: the original weight, the same shape.

    Raises:
        ShapeError: the shapes differ.
    """
    if values.shape != source.shape:
        raise ShapeError(f"the reference has shape {tuple(source.shape)}, expected {tuple(values.shape)}")
    if values.numel() == 0:
        return QuantizationError(0.0, 0.0, 0.0, math.inf, None, 0.0)
    rows = len(source) if source.dim() else 1
    source = source.detach().to(values.device).double().reshape(rows, -1)
    error = values.double().reshape(rows, -1) - source
    errors, norms = error.square().sum(1), source.square().sum(1)  # (rows,)
    relative = torch.where(errors == 0, 0.0, (errors / norms).sqrt())
    noise, power = float(errors.sum()), float(norms.sum())
    worst = int(relative.argmax())
    return QuantizationError(
        mse=noise / values.numel(),
        max=float(error.abs().max()),
        relative_frobenius=0.0 if noise == 0 else math.sqrt(noise / power) if power else math.inf,
        snr_db=math.inf if noise == 0 else 10 * math.log10(power / noise) if power else -math.inf,
        worst_row=worst,
        worst_row_relative=float(relative[worst]),
    )
