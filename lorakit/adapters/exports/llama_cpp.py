"""Export for llama.cpp: a GGUF file with the base's tensor names, for `--lora`.

    <tensor>.lora_a   A (r, in)                   <tensor>.lora_b   B (out, r)
    token_embd.weight.lora_a   Aᵀ (vocab, r)      token_embd.weight.lora_b   B (dim, r)

llama.cpp multiplies B @ A by adapter.lora.alpha / r, with the rank r of the tensor. It has a single alpha and no
rsLoRA. Its llama architecture keeps the rows of the q and k projections in another order, so B needs that order too.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import AdapterError, CheckpointError, LorakitError
from ...files import atomic_write
from ...models.decoder.families import FAMILIES, GGUFForm
from ...models.gguf.gguf_rows import to_gguf_rows
from .base_config import base_size
from .export import Export, check_plain, folded


def export_llama_cpp(export: Export, path: Path) -> None:
    """Write the GGUF file.

    Raises:
        AdapterError: the base's architecture is not known here, the adapter holds more than A and B of linear layers
            and of an untied embedding, or `path` holds something that is not a GGUF file.
        CheckpointError: the base's config.json cannot be read or lacks a size.
        LorakitError: the gguf package is not installed.
    """
    if path.is_dir() or (path.is_file() and path.read_bytes()[:4] != b"GGUF"):
        raise AdapterError(f"{path} exists and is not a GGUF file; choose another path, such as adapter.gguf")
    base = export.base()
    form = _gguf_form(base)
    names = _gguf_names(form.architecture, export.layers, base_size(base, "num_hidden_layers"))
    check_plain(export, "llama.cpp", *_problems(export, names, bool(base.get("tie_word_embeddings"))))
    # The file has one alpha for all layers. B makes up for a layer with another; without patterns no B changes.
    alphas = {name: layer.scaling * layer.rank for name, layer in export.layers.items()}
    alpha = next(iter(alphas.values()))
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in folded(export, {name: layer_alpha / alpha for name, layer_alpha in alphas.items()}).items():
        if form.permutes_qk and name.endswith((".q_proj", ".k_proj")):
            heads = base_size(base, "num_attention_heads")
            b = _in_gguf_rows(b, heads if name.endswith(".q_proj") else base_size(base, "num_key_value_heads", heads))
        tensors[f"{names[name]}.weight.lora_a"] = a.T if export.layers[name].kind == "embedding" else a
        tensors[f"{names[name]}.weight.lora_b"] = b
    _write(path, form.architecture, alpha, tensors)


def _gguf_form(base: Mapping[str, Any]) -> GGUFForm:
    name = str((base.get("architectures") or ["(none)"])[0])
    forms = {architecture: family.gguf for architecture, family in FAMILIES.items() if family.gguf}
    if name not in forms:
        raise AdapterError(
            f"the base's architecture '{name}' cannot be exported to llama.cpp (known: {', '.join(forms)})"
        )
    return forms[name]


def _gguf_names(architecture: str, paths: Iterable[str], layers: int) -> dict[str, str | None]:
    """Return module path -> its tensor's name in GGUF without ".weight", or None if there is no such tensor."""
    gguf = _gguf()
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(key, layers)
    return {path: table.get_name(path) for path in paths}


def _problems(export: Export, names: Mapping[str, str | None], is_tied: bool) -> Iterator[str]:
    for path, layer in export.layers.items():
        if names[path] is None:
            yield f"{path}: the GGUF model has no such tensor"
        elif is_tied and names[path] in ("token_embd", "output"):
            yield f"{path}: embedding and head are one tensor in the GGUF model; an adapter on one would change both"
        elif (names[path] == "token_embd") != (layer.kind == "embedding"):
            yield f"{path}: an adapter of kind '{layer.kind}' on the tensor {names[path]}"


def _in_gguf_rows(b: Tensor, heads: int) -> Tensor:
    """Return a q or k projection's B with its rows in GGUF's order."""
    if len(b) % (2 * heads):
        raise CheckpointError(f"lora_B of a q or k projection has {len(b)} rows, which {heads} heads do not divide")
    return to_gguf_rows(b, heads)


def _write(path: Path, architecture: str, alpha: float, tensors: Mapping[str, Tensor]) -> None:
    gguf = _gguf()
    types = gguf.GGMLQuantizationType
    stored = {torch.float32: types.F32, torch.float16: types.F16, torch.bfloat16: types.BF16}
    with atomic_write(path) as unfinished:
        writer = gguf.GGUFWriter(unfinished, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, tensor in tensors.items():
            kind = stored.get(tensor.dtype, types.F32)
            writer.add_tensor(name, gguf.quantize(tensor.float().contiguous().numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise LorakitError("writing a GGUF file needs the gguf package: pip install lorakit[gguf]") from None
