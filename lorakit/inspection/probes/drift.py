"""How far layers' outputs have drifted from those of the base model, on a few fixed rows of tokens."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import disable_adapters
from ...data import Example

_Look = Callable[[nn.Module, Tensor], None]


def relative_drift(now: Tensor, base: Tensor) -> float:
    """Return ‖now - base‖ / ‖base‖; 0 where both are zero.

    Shapes:
        now, base (tokens, features); computed in float64
    """
    base = base.double()
    moved, norm = float((now.double() - base).norm()), float(base.norm())
    return moved / norm if norm else 0.0 if moved == 0 else float("inf")


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear centered kernel alignment of two representations of the same tokens, from 0 to 1.

    ‖Ycᵀ Xc‖² / (‖Xcᵀ Xc‖ ‖Ycᵀ Yc‖) with columns centered (Kornblith et al. 2019, arXiv:1905.00414, eq. 3), from the
    (tokens, tokens) products. It is 1 if y equals x up to rotation, scale and offset, and NaN if one does not vary.

    Shapes:
        x (tokens, features), y (tokens, other features); computed in float64
    """
    return _alignment(_gram(x), _gram(y))


def probe_rows(examples: Sequence[Example], rows: int, length: int) -> Tensor:
    """Return the beginnings of the first `rows` examples, (rows, tokens) int64, with at most `length` tokens."""
    chosen = [example.input_ids[: min(length, example.lengths[0])] for example in examples[:rows]]
    shortest = min(len(ids) for ids in chosen)
    return torch.tensor([ids[:shortest] for ids in chosen])


class ActivationDrift:
    """Compares layers' outputs with those of the base model, which are recorded when this is made.

    It keeps the base's outputs, (rows · tokens, features) per layer, in the model's dtype on its device.

    Args:
        model: with adapters.
        layers: the layers to compare; a layer may occur twice.
        input_ids: (rows, tokens) int64.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], input_ids: Tensor) -> None:
        self._model, self._layers = model, layers
        self._input_ids = input_ids.to(next(model.parameters()).device)
        self._base: dict[nn.Module, Tensor] = {}
        self._grams: dict[nn.Module, Tensor] = {}

        def keep(layer: nn.Module, output: Tensor) -> None:
            self._base[layer], self._grams[layer] = output, _gram(output)

        with disable_adapters(model):
            self._run(keep)

    def measure(self) -> dict[str, list[float]]:
        """Return relative drift and CKA, one list each in the order of the layers; NaN where no token arrived."""
        drift: dict[nn.Module, float] = {}
        cka: dict[nn.Module, float] = {}

        def compare(layer: nn.Module, output: Tensor) -> None:
            if layer not in self._base or output.shape != self._base[layer].shape:
                return  # an expert that got other tokens
            drift[layer] = relative_drift(output, self._base[layer])
            cka[layer] = _alignment(self._grams[layer], _gram(output))

        self._run(compare)
        return {
            "drift": [drift.get(layer, math.nan) for layer in self._layers],
            "cka": [cka.get(layer, math.nan) for layer in self._layers],
        }

    @torch.no_grad()
    def _run(self, look: _Look) -> None:
        """Run the rows through the model in eval mode; each layer's output goes to `look` and is then released."""

        def hook(layer: nn.Module, _: Any, output: Any) -> None:
            first: Tensor = output[0] if isinstance(output, tuple) else output
            look(layer, first.reshape(-1, first.shape[-1]))

        with contextlib.ExitStack() as stack:
            for layer in dict.fromkeys(self._layers):
                stack.callback(layer.register_forward_hook(hook).remove)
            stack.enter_context(_eval(self._model))
            self._model(input_ids=self._input_ids)


@contextlib.contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def _gram(x: Tensor) -> Tensor:
    """Return the products of all pairs of centered rows, (tokens, tokens) float64."""
    x = x.double()
    x = x - x.mean(0)
    return x @ x.T


def _alignment(first: Tensor, second: Tensor) -> float:
    return float((first * second).sum() / (first.norm() * second.norm()))
