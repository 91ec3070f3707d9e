"""The gradient noise scale, from the micro-batches of one step: how large a batch still pays off."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...sums import flat_slices
from .log import rounded

WINDOW = 50  # number of estimates in a mean


@dataclass(frozen=True)
class NoiseEstimate:
    """One step's estimates of the gradient's noise; both are unbiased, so that one step's may be negative.

    Attributes:
        signal: estimate of |G|², the square of the true gradient's norm.
        trace: estimate of tr(Σ), the variance that one trained token adds to a gradient.
    """

    signal: float
    trace: float


def estimate_noise(squares: Sequence[float], tokens: Sequence[int], square: float) -> NoiseEstimate | None:
    """Estimate the gradient's noise (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1) from k micro-batches.

    With g_i the mean gradient of micro-batch i over its n_i tokens, G that of all N, and tokens taken as independent,
    E|g_i|² = |G_true|² + tr(Σ) / n_i. The mean of |g_i|², weighted by n_i / N, minus |G|² is then tr(Σ) (k - 1) / N in
    expectation. For micro-batches of one size these are the paper's estimates.

    Args:
        squares: |g_i|².
        tokens: n_i.
        square: |G|².

    Returns:
        None for fewer than two micro-batches, which allow no estimate.
    """
    if len(squares) < 2:
        return None
    total = sum(tokens)
    mean = sum(n * squared for n, squared in zip(tokens, squares, strict=True)) / total
    trace = (mean - square) * total / (len(squares) - 1)
    return NoiseEstimate(signal=square - trace / total, trace=trace)


def noise_scale(estimates: Sequence[NoiseEstimate]) -> float | None:
    """Return B_simple = tr(Σ) / |G|² in trained tokens, both averaged before they are divided, as the paper advises.

    None where the estimates are too noisy: a mean is not above zero.
    """
    signal, trace = sum(one.signal for one in estimates), sum(one.trace for one in estimates)
    return trace / signal if signal > 0 and trace > 0 else None


class GradientNoise:
    """Collects the norms of micro-batches' gradients as autograd hands them out, before they are added up.

    Args:
        parameters: all trained parameters.
        earlier: estimates of the steps before a resume.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], earlier: Sequence[NoiseEstimate] = ()) -> None:
        self._recent = deque(earlier, maxlen=WINDOW)
        self._parameters = parameters
        self._handles: list[RemovableHandle] = []
        self._norms: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._tokens: list[int] = []

    def start(self) -> None:
        """Begin a step whose gradients are measured."""
        # Only for this step: autograd copies the gradient of a parameter that has a hook, instead of handing it on.
        self._handles = [parameter.register_hook(self._note) for parameter in self._parameters]
        self._norms, self._squares, self._tokens = [], [], []

    def micro_batch(self, tokens: int) -> None:
        """Note that one backward pass, over so many trained tokens, is done."""
        if self._norms:
            self._squares.append(torch.stack(self._norms).double().square().sum())
            self._tokens.append(tokens)
        self._norms = []

    def finish(self, square: float) -> dict[str, Any]:
        """Return the step's figures.

        Args:
            square: |G|² of the step's whole gradient.
        """
        self.end()
        total = sum(self._tokens)
        # A pass's gradient is that of (its sum of losses / all tokens): n_i / N of its mean gradient.
        squares = [float(one) * (total / n) ** 2 for one, n in zip(self._squares, self._tokens, strict=True)]
        estimate = estimate_noise(squares, self._tokens, square)
        if estimate is not None and not math.isfinite(estimate.trace):
            estimate = None  # the trainer is about to report it
        if estimate is not None:
            estimate = NoiseEstimate(**rounded(asdict(estimate)))  # as a resumed run would read it from the file
            self._recent.append(estimate)
        return {"noise": estimate and asdict(estimate), "noise_scale": noise_scale(self._recent)}

    def end(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note(self, gradient: Tensor) -> None:
        self._norms += [torch.linalg.vector_norm(part, dtype=torch.float32) for part in flat_slices(gradient)]
