"""Predictions of `lorakit.plan` for QLoRA of models of 7 to 70 billion parameters on a GPU, beside published figures.

Nothing is measured here: no GPU has run this. The predictions start from each model's published shape. The published
figures come from papers and documentation, with their own settings as far as these are known.

Run as: python -m bench.plan_sizes [--json FILE]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.harness.make_llama import LLAMA_7B
from bench.harness.report import arguments, finish
from lorakit import LoraConfig, TrainConfig, plan
from lorakit.models import DecoderConfig

LLAMA_3 = LLAMA_7B | {"vocab_size": 128256, "rope_theta": 500_000.0, "max_position_embeddings": 131072}
LLAMA_8B = LLAMA_3 | {"intermediate_size": 14336, "num_key_value_heads": 8}
LLAMA_13B = LLAMA_7B | {
    "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 40,
}  # fmt: skip
LLAMA_70B = LLAMA_3 | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model with settings, and published figures for similar settings.

    Attributes:
        model, config: its name and shape.
        sequences, length, rank: settings of the step.
        published: figures, each with its source.
    """

    model: str
    config: Mapping[str, Any]
    sequences: int
    length: int
    rank: int
    published: str

    def row(self) -> list[object]:
        """Return the table's row, with sizes in GB of 10^9 bytes, as all these sources give them."""
        tokens = self.sequences * self.length
        settings: dict[str, Any] = {"batch_size": self.sequences, "micro_batch_tokens": tokens}
        train = TrainConfig(checkpointing="layer", **settings)
        config = DecoderConfig.from_dict(dict(self.config))
        made = plan(config, LoraConfig(r=self.rank), train, sequence_length=self.length, device="cuda")
        parts = {name: size / 1e9 for name, size in made.parts.items()}
        state = parts["adapters"] + parts["gradients"] + parts["optimizer"]
        rest = sum(parts.values()) - parts["weights"] - state
        what = f"{self.sequences} x {self.length}, r={self.rank}"
        return [self.model, what, made.peak_bytes / 1e9, parts["weights"], state, rest, self.published]


CASES = (
    Case("Llama 7B", LLAMA_7B, 1, 512, 16, "5 GB, the least (Unsloth's documentation); 5 GB (QLoRA, Guanaco 7B)"),
    Case("Llama 7B", LLAMA_7B, 4, 1024, 16, "9 GB with Hugging Face, 7 GB with Unsloth (LLaMA-Factory's wiki)"),
    Case("Llama 3 8B", LLAMA_8B, 1, 512, 16, "6 GB, the least (Unsloth's documentation)"),
    Case("Llama 3 8B", LLAMA_8B, 2, 2048, 8, "7.4 GiB (torchtune's README)"),
    Case("Llama 13B", LLAMA_13B, 1, 512, 16, "8.5 GB for 14B, the least (Unsloth's documentation); 10 GB (QLoRA, 13B)"),
    Case("Llama 3 70B", LLAMA_70B, 1, 512, 16, "41 GB, the least (Unsloth's documentation); 41 GB (QLoRA, 65B)"),
    Case("Llama 3 70B", LLAMA_70B, 1, 12106, 32, "48 GB holds 12,106 tokens with Unsloth (its README)"),
)


def main() -> None:
    """Plan all, print the table."""
    options = arguments(str(__doc__)).parse_args()
    columns = ("model", "step", "planned GB", "weights", "adapter and its state", "all else", "published")
    title = "Memory of QLoRA on a GPU with checkpointing of every layer, NF4 with double quantization, AdamW: planned"
    finish(options, title, columns, [case.row() for case in CASES], [])


if __name__ == "__main__":
    main()
