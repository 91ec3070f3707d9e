"""A and B random in orthogonal halves of the rank: both learn from the first step, and B A = 0.

With a random orthogonal Q (r, r), every other row spans A, beginning with the first, and the other rows span B. So
B A = 0. PEFT draws the same ("orthogonal").
"""

from __future__ import annotations

import torch

from ...errors import AdapterError
from ...layers import AdaptedLayer
from .matrices import set_factors
from .start import Start

_SIZE = 0.1  # standard deviation of the random numbers that multiply Q's rows, PEFT's choice


class Orthogonal(Start):
    """A and B from the halves of a random orthogonal matrix.

    Raises:
        AdapterError: the rank is odd.
    """

    name = "orthogonal"

    def set_layer(self, layer: AdaptedLayer, name: str) -> None:
        rank = len(layer.lora_A[name])
        if rank % 2:
            raise AdapterError(f"init_lora_weights 'orthogonal' halves the rank, which is {rank}; choose an even one")
        device = layer.lora_A[name].device
        columns = layer.lora_A[name].flatten(1).shape[1]
        q = torch.linalg.qr(torch.randn(rank, rank, device=device)).Q
        lora_a = q[0::2].T @ torch.randn(rank // 2, columns, device=device)
        lora_b = torch.randn(layer.out_features, rank // 2, device=device) @ q[1::2]
        set_factors(layer, name, _SIZE * lora_a, _SIZE * lora_b)
