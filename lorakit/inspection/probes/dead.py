"""The alarm for layers that do not learn: B still zero, or no gradient, after so many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

B_IS_ZERO = "B is still zero"
NO_GRADIENT = "no gradient reaches A or B"


class DeadLayers:
    """Watches the rows of the log, and names each dead layer once.

    Args:
        layers: names, in the order of the rows' lists.
        after: steps after which a layer with B still zero is dead, and without gradient for as long.
        earlier: rows of the steps before a resume.
    """

    def __init__(self, layers: Sequence[str], after: int, earlier: Sequence[Mapping[str, Any]] = ()) -> None:
        self._layers, self._after = layers, after
        self._alive = [0] * len(layers)  # the last step in which a gradient arrived
        self._named: dict[str, set[str]] = {B_IS_ZERO: set(), NO_GRADIENT: set()}
        for row in earlier:
            self.look(row)

    def look(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the alarms of a step, as {"what", "layers"}; a layer that was named before is not named again."""
        step = row["step"]
        for place, gradients in enumerate(zip(row["grad_A"], row["grad_B"], strict=True)):
            if any(gradients):
                self._alive[place] = step
        dead = {
            B_IS_ZERO: [norm == 0 and step >= self._after for norm in row["norm_B"]],
            NO_GRADIENT: [step - alive >= self._after for alive in self._alive],
        }
        alarms = []
        for what, is_dead in dead.items():
            fresh = [name for name, dead in zip(self._layers, is_dead, strict=True) if dead]
            fresh = [name for name in fresh if name not in self._named[what]]
            self._named[what].update(fresh)
            if fresh:
                alarms.append({"what": what, "layers": fresh})
        return alarms
