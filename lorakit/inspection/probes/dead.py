"""The alarm for layers that do not learn: B is still zero, or no gradient arrived, after a number of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

B_IS_ZERO = "B is still zero"
NO_GRADIENT = "no gradient reaches A or B"


class DeadLayers:
    """Watches the rows of the log, and reports each dead layer once.

    Args:
        layers: names, in the order of the rows' lists.
        after: a layer is dead if B is still zero after so many steps, or if no gradient arrived for as many.
        earlier: rows of the steps before a resume.
    """

    def __init__(self, layers: Sequence[str], after: int, earlier: Sequence[Mapping[str, Any]] = ()) -> None:
        self._layers, self._after = layers, after
        self._alive = [0] * len(layers)  # the last step in which a gradient arrived
        self._reported: dict[str, set[str]] = {B_IS_ZERO: set(), NO_GRADIENT: set()}
        for row in earlier:
            self.look(row)

    def look(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the alarms of a step, as {"what", "layers"}; no layer is reported twice for the same reason."""
        step = row["step"]
        for index, gradients in enumerate(zip(row["grad_A"], row["grad_B"], strict=True)):
            if any(gradients):
                self._alive[index] = step
        dead = {
            B_IS_ZERO: [norm == 0 and step >= self._after for norm in row["norm_B"]],
            NO_GRADIENT: [step - alive >= self._after for alive in self._alive],
        }
        alarms = []
        for what, is_dead in dead.items():
            names = [name for name, dead in zip(self._layers, is_dead, strict=True) if dead]
            new = [name for name in names if name not in self._reported[what]]
            self._reported[what].update(new)
            if new:
                alarms.append({"what": what, "layers": new})
        return alarms
