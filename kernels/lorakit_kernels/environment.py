"""Settings that PyTorch's CPU libraries read once from the environment. Importing this module makes them.

A value that the user has set stays as it is.
"""

from __future__ import annotations

import os

# oneDNN compiles a kernel for each shape of a bf16 product. It keeps the last 1,024 in each of two caches. Every batch
# with a new number of tokens brings 36 shapes: after 50 batches of SmolLM2-135M in NF4 the process's peak was 1,767
# MiB, with 48 kernels 906 MiB. 48 are those of one batch, so nothing that a step uses twice is compiled twice.
KEPT_KERNELS = 48

for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, str(KEPT_KERNELS))
