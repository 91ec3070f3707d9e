"""Foreign formats of quantized weights in checkpoint folders: one file each, and one line in `STORED_FORMATS`.

`prequantized` reads folders through the table. lorakit writes its own 4-bit weights in the `BITSANDBYTES` format.
"""

from __future__ import annotations

from .bitsandbytes import BITSANDBYTES
from .stored_format import StoredFormat, StoredWeight

__all__ = ["BITSANDBYTES", "STORED_FORMATS", "StoredFormat", "StoredWeight"]

STORED_FORMATS: dict[str, StoredFormat] = {form.method: form for form in (BITSANDBYTES,)}
