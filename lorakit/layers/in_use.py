"""Which adapters a module uses, remembered and put back: for what is computed again later, in the backward pass.

By then the caller may have switched adapters or left `use_rows`; the second forward pass must be the first one's equal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from .adapted import AdapterModule
from .row_adapters import RowAdapters


class AdaptersInUse:
    """The state of all adapted layers within a module, as it is now."""

    def __init__(self, module: nn.Module) -> None:
        parts = [part for part in module.modules() if isinstance(part, AdapterModule)]
        self._state = [(part, part.active, part.rows) for part in parts]
        self._rows = next((part.rows for part in parts if part.rows is not None), None)
        self._lengths = None if self._rows is None else self._rows.lengths

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Within the context the module uses the adapters it used then."""
        now = [(part, part.active, part.rows) for part, _, _ in self._state]
        _put(self._state)
        try:
            with contextlib.nullcontext() if self._rows is None else self._rows.laid_out(self._lengths):
                yield
        finally:
            _put(now)


def _put(state: list[tuple[AdapterModule, tuple[str, ...], RowAdapters | None]]) -> None:
    for part, active, rows in state:
        part.active, part.rows = active, rows
