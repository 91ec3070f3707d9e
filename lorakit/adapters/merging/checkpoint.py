"""`merge_checkpoint`: merge an adapter folder into a 16-bit checkpoint folder, tensor by tensor, as a new folder.

No model is built: the source is streamed with one tensor at a time in memory. The layers that a model would have merge
each tensor, so the folder holds, to the bit, the weights that `merge_adapter` gives.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.formats import BITSANDBYTES
from ...checkpoints.prequantized import find_stored
from ...checkpoints.shards import SHARD_BYTES, copy_small_files, grouped, write_index, write_shard
from ...checkpoints.stream import file_order, stream_tensors
from ...checkpoints.tied_head import EMBEDDING, HEAD, TIED_KEY, is_head_tied
from ...errors import AdapterError, CheckpointError, ConfigError, StorageError, did_you_mean, listing
from ...files import atomic_folder, check_space, write_text
from ...layers import AdaptedLayer, LoRAConv, LoRAEmbedding, LoRALinear
from ...models.load import empty_decoder, weight_formats
from ...models.pretrained import resolve_model
from ...quantization import QuantizedWeight
from ...quantization.bnb_format import Layout
from ...quantization.policy import QuantConfig, WeightFormat
from ..peft.fingerprint import check_checkpoint
from ..peft.folder import AdapterFolder, AdapterLayer, read_adapter_folder
from ..peft.names import BASE_LAYER, START_KEY
from .modules import dense_linear
from .report import LayerMerge, MergeReport
from .weights import MergedWeight, MergeUpdate, merged_4bit, merged_dense, quantized

_EMBEDDINGS = (EMBEDDING, "transformer.wte.weight", "embed_tokens.weight", "wte.weight")


def merge_checkpoint(
    adapter: str | os.PathLike[str],
    target: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    quantize: QuantConfig | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write a checkpoint folder with an adapter merged into its weights, for lorakit and for transformers.

    Args:
        adapter: the adapter's folder, or that of a run.
        target: the folder to write. It must not exist, and it appears only when it is complete.
        base: folder or known name of the 16-bit checkpoint; None takes the one that the adapter's config names.
        quantize: write linear layers in 4 bits, as bitsandbytes and transformers read them; with None every tensor
            keeps its dtype.
        shard_bytes: most bytes in one file, unless a single tensor has more.
        progress: called with the bytes of the source that are done and their total.

    Raises:
        AdapterError: the adapter has tensors that a checkpoint cannot hold (the message names each), or it holds what
            quantization took from the base.
        CheckpointError: the base or the adapter is missing or malformed, or they do not fit each other.
        ConfigError: the base is in 4 bits already, or no base is named; with `quantize`, the architecture is not
            supported or a pattern has no effect.
        StorageError: the target exists or cannot be written. Nothing is left half-written.
    """
    target = Path(target)
    if target.exists():
        raise StorageError(f"{target} exists already; name a new folder, or remove it first")
    folder = read_adapter_folder(adapter)
    checkpoint = Checkpoint(_base_of(folder) if base is None else resolve_model(base))
    if find_stored(checkpoint):
        raise ConfigError(f"{checkpoint.folder} is in 4 bits already; merge into the 16-bit model it was made from")
    check_checkpoint(checkpoint, folder.base, folder.layers, str(folder.folder))
    if (start := folder.metadata.get(START_KEY)) is not None:
        raise AdapterError(
            f"{folder.folder}: '{start}' starts at the error of quantizing the base, which {checkpoint.folder} does "
            "not have; merge it into the quantized model with load_adapter and merge_adapter"
        )
    plan = _CheckpointMerge.make(folder, checkpoint, quantize)
    with atomic_folder(target) as unfinished:
        return plan.write(unfinished, shard_bytes, progress)


def _base_of(folder: AdapterFolder) -> Path:
    """Return the folder of the base model that an adapter's config names."""
    name = folder.config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{folder.folder}: its config names no base model; name it with base=")
    try:
        return resolve_model(name)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder.folder}: the base model of its config is not here; name it with base=: {error}"
        ) from None


@dataclass
class _CheckpointMerge:
    """The plan of a merged checkpoint.

    Attributes:
        checkpoint, folder: the base and the adapter.
        layers: weight -> path of the adapter's layer that changes it.
        biases: bias -> path of the adapter's layer that adds to it.
        replaced: tensor -> key of the adapter's tensor that takes its place.
        copies: new tensor -> the tensor whose values it starts from: for an output head that was tied.
        unties: whether the head has values of its own from now on, or always had, and config.json says that it is tied.
        formats: tensor to write -> how it is quantized, or None.
        quantize: the settings of these formats.
    """

    checkpoint: Checkpoint
    folder: AdapterFolder
    layers: dict[str, str] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    unties: bool = False
    formats: dict[str, WeightFormat | None] = field(default_factory=dict)
    quantize: QuantConfig | None = None

    @staticmethod
    def make(folder: AdapterFolder, checkpoint: Checkpoint, quantize: QuantConfig | None) -> _CheckpointMerge:
        """Find the tensors that the adapter changes; errors as `merge_checkpoint`."""
        plan = _CheckpointMerge(checkpoint, folder, quantize=quantize)
        plan._match()
        names = [name for name in file_order(checkpoint, checkpoint.names) if name not in plan.copies]
        plan.formats = dict.fromkeys([*names, *plan.copies])
        if quantize is not None:
            plan.formats |= weight_formats(empty_decoder(checkpoint), quantize, names)
            if not any(plan.formats.values()):
                raise ConfigError("nothing would be quantized: quant_type is null, or all linear layers are skipped")
        return plan

    def _match(self) -> None:
        """Fill in layers, biases, replaced and copies."""
        names, extras = set(self.checkpoint.names), dict.fromkeys(self.folder.extras)
        changed = {f"{path}.weight" for path in self.folder.layers} | set(extras)
        problems = [*self._unknown_ties(changed & names)]
        values = self.checkpoint.config()
        embedding = next((name for name in _EMBEDDINGS if name in names), None)
        is_tied = embedding is not None and is_head_tied(self.checkpoint, values, embedding)
        self.unties = embedding is not None and not is_tied and bool(values.get(TIED_KEY))
        if is_tied and embedding is not None and changed & {HEAD, embedding}:
            if self.folder.config.get("ensure_weight_tying") and extras.keys() & {HEAD, embedding}:
                key = embedding if embedding in extras else HEAD  # a copy of both, under either name or both
                extras = {other: None for other in extras if other not in (HEAD, embedding)}
                self.replaced |= {name: key for name in (embedding, HEAD) if name in names}
            else:
                self.copies[HEAD], self.unties = embedding, True
                names.add(HEAD)
        for path, layer in self.folder.layers.items():
            weight, bias = f"{path}.weight", f"{path}.bias"
            is_conv1d = layer.kind == "linear" and self.folder.config.get("fan_in_fan_out")
            if layer.kind == "experts" or is_conv1d:
                kind = "Conv1D" if is_conv1d else layer.kind
                problems.append(f"{path}: {kind} layers are not merged from files; merge the loaded model and save it")
            elif weight not in names:
                problems.append(f"{weight} is not in the base{did_you_mean(weight, names)}")
            else:
                self.layers[weight] = path
                if layer.attached(torch.float32).offset is not None:
                    self.biases[bias] = path
                    problems += [] if bias in names else [f"{bias} is not in the base, and the adapter adds to it"]
        for key in extras:
            name = key if key in names else key.replace(f".{BASE_LAYER}.", ".")
            if name not in names:
                problems.append(f"{key} has no place in a checkpoint: no tensor {name}")
            self.replaced[name] = key
        if problems:
            raise AdapterError(
                f"{self.folder.folder} cannot be merged into {self.checkpoint.folder}:{listing(problems)}"
            )

    def _unknown_ties(self, changed: Collection[str]) -> Iterator[str]:
        """Yield the tables that the adapter changes and that the model may share in ways that only its class knows."""
        config = self.checkpoint.config()
        tied, vocabulary = config.get("tie_word_embeddings"), config.get("vocab_size")
        classes = [str(name) for name in config.get("architectures") or ()]
        has_head = any(word in name for name in classes for word in ("LM", "PreTraining", "Generation"))
        is_sequence_pair = bool(config.get("is_encoder_decoder"))
        if tied is False or not (has_head or is_sequence_pair):
            return
        known = {HEAD, *_EMBEDDINGS} if tied or HEAD in self.checkpoint.names else {HEAD}
        for name in sorted(changed):
            is_table = self.checkpoint.shape(name)[:1] == (vocabulary,)
            if is_table and (is_sequence_pair or name not in known):
                yield (
                    f"{name}: {classes[0] if classes else 'the model'} may share this table with modules that the "
                    "checkpoint does not name; merge the loaded model and save it"
                )

    def write(self, folder: Path, shard_bytes: int, progress: Callable[[int, int], None] | None) -> MergeReport:
        """Write all files into a folder."""
        layouts = {name: self._layouts(name) for name in self.formats}
        sizes = {
            name: sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
            for name, layout in layouts.items()
        }
        check_space(folder, sum(sizes.values()))
        report = MergeReport((str(self.folder.folder),), [], self.checkpoint.folder)
        shards, stream = grouped(sizes, shard_bytes), self._tensors(report, progress)
        for file, names in shards.items():
            expected = {key: layout for name in names for key, layout in layouts[name].items()}
            stored = (pair for name, value in islice(stream, len(names)) for pair in self._stored(name, value))
            write_shard(folder / file, expected, stored)
        write_index(folder, list(shards))
        copy_small_files(self.checkpoint.folder, folder)
        write_text(folder / "config.json", json.dumps(self._config(), indent=2, ensure_ascii=False) + "\n")
        if self.copies:
            report.notes.append(f"{HEAD} was tied to {self.copies[HEAD]} and has its own values from now on")
        return report

    def _tensors(
        self, report: MergeReport, progress: Callable[[int, int], None] | None
    ) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """Yield each tensor to write, merged, in the order of the file."""
        total = sum(self._entry_bytes(name) for name in self.formats)
        done = 0
        names = [name for name in self.formats if name not in self.copies]
        streamed = stream_tensors(self.checkpoint, dict.fromkeys(names))
        copied = ((name, self.checkpoint.read(source).clone()) for name, source in self.copies.items())
        for tensors in (streamed, copied):
            for name, tensor in tensors:
                assert isinstance(tensor, Tensor)  # `stream_tensors` was given no format
                done += self._entry_bytes(name)
                merged = self._merged(name, tensor, report)
                if progress is not None:
                    progress(done, total)  # here, since nothing resumes the generator after its last yield
                yield name, merged

    def _merged(self, name: str, tensor: Tensor, report: MergeReport) -> Tensor | QuantizedWeight:
        """Return a tensor with the adapter's change, in the format in which it is written."""
        form = self.formats[name]
        if name in self.replaced:
            new = self.folder.extras[self.replaced[name]]
            if new.shape != tensor.shape:
                raise AdapterError(
                    f"{self.replaced[name]} has shape {tuple(new.shape)}, the base has {tuple(tensor.shape)}"
                )
            tensor = new.to(tensor.dtype)
        if name in self.biases:
            layer = self.folder.layers[self.biases[name]]
            offset = layer.attached(torch.float32).offset
            assert offset is not None  # otherwise it would not be among the biases
            tensor = (tensor.float() + offset).to(tensor.dtype)
        if name in self.layers:
            merged, entry = merge_tensor(self.folder.layers[self.layers[name]], tensor, form)
            report.layers.append(entry)
            return merged.weight
        return tensor if form is None else quantized(tensor, form, tensor.dtype)

    def _stored(self, name: str, value: Tensor | QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the file that hold one weight."""
        if isinstance(value, Tensor):
            yield name, value
            return
        yield from BITSANDBYTES.tensors(name, value, self._storage_dtype()).items()

    def _layouts(self, name: str) -> dict[str, Layout]:
        entry, form = self.checkpoint.entry(self.copies.get(name, name)), self.formats[name]
        if form is None:
            return {name: (entry.dtype, entry.shape)}
        return BITSANDBYTES.layouts(name, (entry.dtype, entry.shape), form, self._storage_dtype())

    def _storage_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.quantize.storage_dtype if self.quantize else "uint8")
        return dtype

    def _entry_bytes(self, name: str) -> int:
        entry = self.checkpoint.entry(self.copies.get(name, name))
        return entry.end - entry.start

    def _config(self) -> dict[str, Any]:
        values = self.checkpoint.config()
        if self.unties:
            values[TIED_KEY] = False
        if self.quantize is not None:
            linear = [
                path for path, module in empty_decoder(self.checkpoint).named_modules() if isinstance(module, nn.Linear)
            ]
            dense = [path for path in linear if self.formats.get(f"{path}.weight") is None]
            section = BITSANDBYTES.config_section(self.quantize, self.formats, dense, values)
            values["quantization_config"] = section
        return values


@torch.no_grad()
def merge_tensor(layer: AdapterLayer, weight: Tensor, form: WeightFormat | None) -> tuple[MergedWeight, LayerMerge]:
    """Merge one layer of an adapter's files into its base weight, with the arithmetic of the layer itself.

    Args:
        layer: from the adapter's files.
        weight: (out, in), of an embedding (vocab, dim), of a convolution (out, in, *kernel).
        form: how to quantize the result; None keeps the weight's dtype.

    Raises:
        AdapterError: the shapes do not fit, or the result would hold inf or nan.
    """
    expected = tuple(layer.update().shape)
    if layer.kind == "embedding":
        expected = expected[::-1]
    elif layer.kind == "conv":
        expected = (expected[0], *layer.lora_A.shape[1:])  # a grouped base has fewer inputs, and is refused here
    if weight.shape != expected:
        raise AdapterError(f"{layer.path}: the adapter is for a weight of shape {expected}, not {tuple(weight.shape)}")
    update = MergeUpdate.of(_adapted(layer, weight), [_NAME])
    if form is None:
        merged = merged_dense(weight, update.dense, weight.dtype, "16-bit base + update")
    else:
        merged = merged_4bit(weight, update.dense, form, weight.dtype, "4 bits of base + update")
    if not torch.isfinite(merged.real).all():
        raise AdapterError(f"{layer.path}: the merged weight would hold inf or nan in {weight.dtype}")
    nbytes = weight.nbytes, merged.nbytes
    return merged, LayerMerge.measure(layer.path, merged.how, weight, update.dense, merged.real, nbytes=nbytes)


_NAME = "merged"


def _adapted(layer: AdapterLayer, weight: Tensor) -> AdaptedLayer:
    """Return the adapted layer that a model would have with this weight."""
    adapted: AdaptedLayer
    if layer.kind == "embedding":
        adapted = LoRAEmbedding(nn.Embedding.from_pretrained(weight))
    elif layer.kind == "conv":
        adapted = LoRAConv(_convolution(weight))
    else:
        adapted = LoRALinear(dense_linear(weight, None))
    adapted.attach(_NAME, layer.attached(torch.float32))
    return adapted


def _convolution(weight: Tensor) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """Return a frozen convolution with a kernel (out, in, *kernel); what moves it over its input does not matter."""
    out_channels, in_channels, *kernel = weight.shape
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
    module = kind(in_channels, out_channels, tuple(kernel), bias=False, device="meta")  # type: ignore[arg-type]
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module
