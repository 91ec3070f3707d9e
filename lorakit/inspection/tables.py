"""Tidy tables: every result here gives a list of rows, and a data frame where pandas or polars is installed."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import LorakitError


class Tidy:
    """A result that is a table: one flat row per observation."""

    def table(self) -> list[dict[str, Any]]:
        """Return the rows; each column holds a number, a word or None."""
        raise NotImplementedError

    def to_pandas(self) -> Any:
        """Return `table` as a pandas.DataFrame.

        Raises:
            LorakitError: pandas is not installed.
        """
        return _package("pandas").DataFrame(self.table())

    def to_polars(self) -> Any:
        """Return `table` as a polars.DataFrame.

        Raises:
            LorakitError: polars is not installed.
        """
        return _package("polars").DataFrame(self.table(), infer_schema_length=None)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise LorakitError(f"{name} is not installed; install it with: pip install {name}, or use table()") from None
