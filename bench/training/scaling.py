"""Growth of training memory with the sequence length and with the vocabulary: lorakit, and PEFT + bitsandbytes.

The model has SmolLM2-135M's width with 10 layers and random weights, in NF4. Sequences of varying length use its own
vocabulary, and varying vocabularies use 1,024 tokens. A separate process for each size takes two steps. Training memory
is the peak of the steps minus the resident size before the first. That leaves out the weights, because the table of
embeddings grows with the vocabulary on both sides. PEFT has gradient checkpointing, sdpa attention and the adapter in
bf16, the settings that need the least memory.

lorakit's memory must grow along a straight line with the length, and be the same for all vocabularies.

Run as: python -m bench.scaling [--longest 8192] [--check] [--json FILE] [--plot FILE]
"""

from bench.training.memory import by_size

if __name__ == "__main__":
    by_size(str(__doc__))
