"""How training memory grows with the length of the sequence and with the vocabulary: lorakit, and PEFT + bitsandbytes.

The model has SmolLM2-135M's width with 10 layers and random weights, in NF4; its own vocabulary where the length
varies, and 1,024 tokens where the vocabulary does. Each size is a process of its own that takes two steps. Training
memory is the peak of the steps above what was resident before the first: the weights are left out, for a table of
embeddings grows with the vocabulary whoever trains. PEFT has gradient checkpointing, sdpa attention and the adapter in
bf16, the settings that need the least.

Ours must be a straight line in the length, and the same for all vocabularies.

Run as: python -m bench.scaling [--longest 8192] [--check] [--json FILE] [--plot FILE]
"""

from bench.training.memory import by_size

if __name__ == "__main__":
    by_size(str(__doc__))
