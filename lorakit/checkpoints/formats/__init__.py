"""Foreign formats of quantized weights in checkpoint folders: one file each, and one line in `STORED_FORMATS`.

`prequantized` reads folders through the table. What lorakit writes in 4 bits is in the format of `BITSANDBYTES`.
"""

from __future__ import annotations

from .bitsandbytes import BITSANDBYTES
from .stored_format import StoredFormat, StoredWeight

__all__ = ["BITSANDBYTES", "STORED_FORMATS", "StoredFormat", "StoredWeight"]

STORED_FORMATS: dict[str, StoredFormat] = {form.method: form for form in (BITSANDBYTES,)}
