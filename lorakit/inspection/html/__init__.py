"""Results of an inspection as an HTML page and as a picture."""

from .page import write_page
from .plot import plot

__all__ = ["plot", "write_page"]
