"""Plain LoRA: W + scaling * B @ A (Hu et al. 2021, arXiv:2106.09685, eq. 3). rsLoRA differs only in the scaling."""

from __future__ import annotations

from .variant import Variant


class Plain(Variant):
    """The plain update."""

    name = "plain"
    title = "LoRA"
    peft_type = "LORA"
