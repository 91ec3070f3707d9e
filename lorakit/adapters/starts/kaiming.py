"""LoRA's own start: A Kaiming-uniform, B zero (Hu et al. 2021, arXiv:2106.09685, section 4.1).

`AdaptedLayer.add` draws it, each kind of layer in its own way: an embedding has A zero and B normal.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...layers import AdaptedLayer
from .start import Start, StartData


class Kaiming(Start):
    """A random, B zero: the adapter changes nothing yet."""

    name = True

    def run(self, layers: Mapping[str, AdaptedLayer], name: str, data: StartData) -> None:
        pass


class RandomKaiming(Kaiming):
    """A and B random, so that the adapter changes the model from the first step: for tests of file formats."""

    name = False
    is_neutral = False
