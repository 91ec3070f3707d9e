"""The values an adapter starts from, one file each; a new one is a file and a line in the table.

Plain LoRA's own start, A Kaiming-uniform and B zero, is `AdaptedLayer.add`; these give other values to A and B of an
adapter that was attached so.
"""

from collections.abc import Callable

from ...layers import AdaptedLayer
from .gaussian import gaussian

__all__ = ["INITS", "Init"]

Init = Callable[[AdaptedLayer, str], None]  # of a layer, and the adapter's name

INITS: dict[str, Init] = {
    "gaussian": gaussian,
}
