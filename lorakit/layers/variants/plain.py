"""Plain LoRA: W + scaling * B @ A (Hu et al. 2021, arXiv:2106.09685, eq. 3). rsLoRA differs in the scaling alone."""

from __future__ import annotations

from .variant import Variant


class Plain(Variant):
    """The update as it is."""

    name = "plain"
    title = "LoRA"
    peft_type = "LORA"
