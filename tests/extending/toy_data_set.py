"""A ready-made data set: eight sums, and two more to be held out."""

from __future__ import annotations

import random
from pathlib import Path

from lorakit import Record, save_records
from lorakit.data import Message


def build_sums(folder: Path, seed: int) -> str:
    """Write train.jsonl and eval.jsonl; return how many conversations they hold."""
    numbers = random.Random(seed)
    pairs = [(numbers.randrange(10), numbers.randrange(10)) for _ in range(10)]
    records = [
        Record((Message("user", f"{a} + {b}"), Message("assistant", str(a + b))), f"sums:{line}")
        for line, (a, b) in enumerate(pairs, start=1)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    save_records(folder / "train.jsonl", records[:8])
    save_records(folder / "eval.jsonl", records[8:])
    return "8 sums to train on, 2 held out"
