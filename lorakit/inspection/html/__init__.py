"""What was measured, as a page and as a picture."""

from .page import write_page
from .plot import plot

__all__ = ["plot", "write_page"]
