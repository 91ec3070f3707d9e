"""`quantize_checkpoint`: make a 4-bit folder from a 16-bit one, for lorakit and for transformers with bitsandbytes.

The source is streamed: besides what `stream` holds, one quantized tensor is in memory. The shards are written one after
the other into DST.partial, each whole or not at all, beside a hash of the plan. After an interruption, the same call
continues there. The last step renames DST.partial to DST.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import Tensor

from ..checkpoints.formats import BITSANDBYTES
from ..checkpoints.shards import PLAN_FILE, SHARD_BYTES, copy_small_files, write_index, write_shard
from ..checkpoints.stream import stream_tensors
from ..checkpoints.tied_head import HEAD, TIED_KEY
from ..errors import StorageError
from ..files import check_space, read_json_object, write_text
from ..locks import locked
from ..printed import Printed
from ..quantization import QuantizedWeight
from ..quantization.policy import QuantConfig
from .pretrained import resolve_model
from .quantize_plan import QuantizePlan


@dataclass(frozen=True, repr=False)
class QuantizedFolder(Printed):
    """What `quantize_checkpoint` wrote.

    Attributes:
        folder: the new folder.
        quantized, kept: numbers of tensors that are now in 4 bits, and that were copied.
        source_bytes, nbytes: of all tensors, before and after.
        misaligned: quantized weights whose rows are not whole blocks. lorakit reads them correctly, but the CPU kernel
            of bitsandbytes 0.50.2 uses wrong scales for many of them.
    """

    folder: Path
    quantized: int
    kept: int
    source_bytes: int
    nbytes: int
    misaligned: list[str]

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {self.quantized} weights in 4 bits, {self.kept} tensors unchanged",
            f"{self.source_bytes / 1e9:,.2f} GB became {self.nbytes / 1e9:,.2f} GB",
        ]
        if self.misaligned:
            lines.append(
                f"note: the rows of {len(self.misaligned)} weights ({self.misaligned[0]}, ...) are not whole blocks: "
                "lorakit computes them correctly, but bitsandbytes 0.50.2 does not on the CPU"
            )
        return "\n".join(lines)


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    config: QuantConfig | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizedFolder:
    """Write a quantized copy of a checkpoint folder, with its tokenizer and other small files.

    Repeating an interrupted call continues it: finished shards are not written again.

    Args:
        source: the folder, or the name of a known model.
        target: the folder to write; it must not exist, and appears only when it is complete.
        config: what is quantized, and how; by default NF4 with double quantization, all linear layers but the head.
        shard_bytes: most bytes in one file; a larger tensor gets a file of its own.
        progress: called after every band with the bytes of the source that are done, and with all of them.

    Raises:
        CheckpointError: the source is malformed or does not fit its config.json, or a weight has inf or nan.
        ConfigError: its architecture is not supported, it is quantized already, a pattern has no effect, or a weight's
            bytes do not divide into elements of the storage dtype.
        StorageError: the target exists, the disk has too little room, or an unfinished run of another plan is in the
            way.
    """
    target = Path(target)
    if target.exists():
        raise StorageError(f"{target} exists already; name a new folder, or remove it first")
    plan = QuantizePlan.make(resolve_model(source), config or QuantConfig(), shard_bytes)
    partial = target.with_name(f"{target.name}.partial")
    with _claimed(partial, plan):
        _write_shards(plan, partial, progress)
        nbytes = _write_other_files(plan, partial)
        os.replace(partial, target)
        (target / PLAN_FILE).unlink()
    quantized = sum(form is not None for form in plan.formats.values())
    kept = len(plan.formats) - quantized
    return QuantizedFolder(target, quantized, kept, plan.source_bytes(plan.formats), nbytes, plan.misaligned())


@contextlib.contextmanager
def _claimed(partial: Path, plan: QuantizePlan) -> Iterator[None]:
    """Hold DST.partial, new or left by an earlier run of the same plan; after a failure it stays if it has a shard."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial):
            for leftover in partial.glob(".*.part"):  # of a run that was killed
                leftover.unlink()
            if (partial / PLAN_FILE).exists():
                if read_json_object(partial / PLAN_FILE).get("plan") != plan.digest:
                    raise StorageError(
                        f"{partial} holds an unfinished run with another source or other settings; repeat that run "
                        f"to continue it, or remove the folder"
                    )
            elif any(partial.iterdir()):
                raise StorageError(f"{partial} is in the way: it is not an unfinished run; rename or remove it")
            write_text(partial / PLAN_FILE, json.dumps({"plan": plan.digest}) + "\n")
            try:
                yield
            except Exception:
                if not any((partial / file).exists() for file in plan.shards):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {partial}: {error.strerror or error}") from error


def _write_shards(plan: QuantizePlan, partial: Path, progress: Callable[[int, int], None] | None) -> None:
    """Write the shards that are not there yet."""
    todo = {file: names for file, names in plan.shards.items() if not (partial / file).exists()}
    formats = {name: plan.formats[name] for names in todo.values() for name in names}
    check_space(partial, plan.written_bytes(formats))
    total = plan.source_bytes(plan.formats)
    done = total - plan.source_bytes(formats)

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    count(0)
    # One stream over all shards, so that reading goes on while a shard's end is written.
    stream = stream_tensors(plan.checkpoint, formats, progress=count)
    for file, names in todo.items():
        write_shard(partial / file, plan.layouts(names), _stored_tensors(plan, islice(stream, len(names))))


def _stored_tensors(
    plan: QuantizePlan, stream: Iterator[tuple[str, Tensor | QuantizedWeight]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a file stores for those of a stream; a quantized weight becomes several."""
    for name, value in stream:
        if isinstance(value, QuantizedWeight):
            yield from BITSANDBYTES.tensors(name, value, plan.storage_dtype).items()
        else:
            yield name, value


def _write_other_files(plan: QuantizePlan, partial: Path) -> int:
    """Write the shards' index, config.json and copies of the small files; return the bytes of all tensors."""
    total = write_index(partial, list(plan.shards))
    copy_small_files(plan.checkpoint.folder, partial)
    values = plan.checkpoint.config()
    section = BITSANDBYTES.config_section(plan.config, plan.formats, plan.dense_layers, values)
    values["quantization_config"] = section
    if HEAD in plan.formats:
        values[TIED_KEY] = False  # the source's key may say otherwise, and transformers 4 would believe it
    write_text(partial / "config.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    return total
