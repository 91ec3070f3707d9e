"""LoRA's own start: A Kaiming-uniform, B zero (Hu et al. 2021, arXiv:2106.09685, section 4.1).

`AdaptedLayer.add` draws these values, so `run` has nothing to do. An embedding has A zero and B normal instead.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...layers import AdaptedLayer
from .start import Start, StartData


class Kaiming(Start):
    """A random, B zero: the adapter changes nothing at first."""

    name = True

    def run(self, layers: Mapping[str, AdaptedLayer], name: str, data: StartData) -> None:
        pass


class RandomKaiming(Kaiming):
    """A and B random: the adapter changes the model at once. For tests of file formats."""

    name = False
    is_neutral = False
