"""Remembers which adapters a module uses and restores them, for a forward pass that the backward pass repeats.

By then the caller may have switched adapters or left `use_rows`. The second forward pass must equal the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from .adapter_module import AdapterModule
from .row_adapters import RowAdapters


class AdaptersInUse:
    """The adapters that are active in a module's adapted layers when this object is made."""

    def __init__(self, module: nn.Module) -> None:
        layers = [layer for layer in module.modules() if isinstance(layer, AdapterModule)]
        self._state = [(layer, layer.active, layer.rows) for layer in layers]
        self._rows = next((layer.rows for layer in layers if layer.rows is not None), None)
        self._lengths = None if self._rows is None else self._rows.lengths

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Within the context, the module uses these adapters again."""
        now = [(layer, layer.active, layer.rows) for layer, _, _ in self._state]
        _set_state(self._state)
        try:
            with contextlib.nullcontext() if self._rows is None else self._rows.laid_out(self._lengths):
                yield
        finally:
            _set_state(now)


def _set_state(state: list[tuple[AdapterModule, tuple[str, ...], RowAdapters | None]]) -> None:
    for layer, active, rows in state:
        layer.active, layer.rows = active, rows
