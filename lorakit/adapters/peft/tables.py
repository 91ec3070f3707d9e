"""Frozen tables in an adapter's file: those of a resized vocabulary, and those under an adapted embedding.

`resize_token_embeddings` of transformers draws new rows at random, so an adapter that was trained with them needs them.
PEFT writes the whole tables then, and those of an adapted embedding always. Here a file holds a table only if the model
has rows that its checkpoint lacks and the adapter does not train them. Loading compares the tables with the model's and
takes over new rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...layers import AdaptedLayer, AdapterModule, SavedModule, TiedModule, TrainedTokens
from ...layers.frozen.calls import is_elsewhere, present
from ...layers.frozen.quantized_module import QuantizedModule
from ..attach.state import adapter_configs, adapter_modules
from ..attach.ties import Holder, Ties, named_embedding, plain_path
from ..attach.wrappers import is_divided, whole
from .fingerprint import vocabulary_of_checkpoint
from .names import BASE_LAYER, PREFIX

# What PEFT's modules put between their own path and the name of a frozen parameter.
_WRAPPERS = ("", f"{BASE_LAYER}.", f"token_adapter.{BASE_LAYER}.", "original_module.")
_SHOWN = 8  # rows in a message
_DRAWN = "resize_token_embeddings drew at random"


class NewRows(NamedTuple):
    """Rows of a table that a model takes from an adapter's file.

    Attributes:
        where: the table's name in the model.
        table: (rows of the model, width).
        rows: their numbers.
        stored: the file's table, of the same shape.
    """

    where: str
    table: nn.Parameter
    rows: list[int]
    stored: Tensor


def needed_tables(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the tables that the file of an adapter has to hold, name in the file -> (rows, width)."""
    return {key: _table(holder) for key, holder in _needed(model, name)}


def _needed(model: nn.Module, name: str) -> Iterator[tuple[str, Holder]]:
    vocabulary = vocabulary_of_checkpoint(model)
    modules = {plain_path(model, path): module for path, module in adapter_modules(model, name).items()}
    written: set[int] = set()
    for holder in _embeddings(model) if vocabulary is not None else ():
        weight = holder.module.get_parameter(holder.name)
        new = set(range(vocabulary or 0, len(weight)))
        if new - _trained_rows(modules, holder, name, len(weight)) and id(weight) not in written:
            written.add(id(weight))
            between = _WRAPPERS[1] if isinstance(modules.get(holder.path), AdaptedLayer) else _WRAPPERS[0]
            between = _WRAPPERS[2] if isinstance(modules.get(holder.path), TrainedTokens) else between
            yield f"{PREFIX}{holder.path}.{between}{holder.name}", holder


def find_tables(model: nn.Module, keys: Collection[str]) -> dict[str, Holder]:
    """Return which names in a file are those of frozen parameters of the model: name -> the parameter's holder.

    The holder of a weight in 4 bits holds its codes.
    """
    free = {holder.path for holder in _embeddings(model)}
    found = {}
    for holder in Ties(model).every():
        for between in _WRAPPERS:
            key = f"{PREFIX}{holder.path}.{between}{'weight' if _is_codes(holder) else holder.name}"
            if key in keys and (between or holder.path in free):
                found[key] = holder
    return found


def compare_tables(
    model: nn.Module, tensors: Mapping[str, Tensor], tables: Mapping[str, Holder]
) -> tuple[list[str], list[NewRows]]:
    """Return where the frozen tables of a file differ from those of the model: problems, and rows to take over.

    New rows of a resized vocabulary are random numbers that no checkpoint holds, so the model can take the adapter's,
    unless another adapter counts on those that are there.

    Args:
        tensors: name in the file -> tensor of any shape.
        tables: of `find_tables`.
    """
    problems, taken = [], []
    vocabulary = vocabulary_of_checkpoint(model)
    for key, holder in tables.items():
        if _is_codes(holder):
            continue  # they cannot be compared
        own, stored, where = _table(holder), tensors[key], f"{holder.path}.{holder.name}"
        if own.shape != stored.shape:
            advice = ""
            if own.shape[1:] == stored.shape[1:]:
                advice = f"; the vocabulary was resized: call model.resize_token_embeddings({len(stored)}) first"
            problems.append(f"{key} has shape {tuple(stored.shape)}, the model's {tuple(own.shape)}{advice}")
        elif not (rows := _different_rows(own.cpu(), stored)):
            continue
        elif vocabulary is None or rows[0] < vocabulary or not torch.isfinite(stored).all():
            problems.append(
                f"{key} differs from this model's {where} in {len(rows)} of {len(own)} rows: it is the table of "
                "another base model, or was changed"
            )
        elif adapter_configs(model) or "lora_merged" in vars(model):
            problems.append(
                f"{key} differs from this model's {where} in {_shown(rows)}, which {_DRAWN}; other adapters of the "
                "model may count on its own, so load this one into a model without any, or with check_base=False"
            )
        elif is_elsewhere(holder.module) or is_divided(model):
            problems.append(
                f"{key} differs from this model's {where} in {_shown(rows)}, which {_DRAWN} and which cannot be "
                "replaced while the table is divided or offloaded; load the adapter before that, or with "
                "check_base=False"
            )
        else:
            taken.append(NewRows(where, holder.module.get_parameter(holder.name), rows, stored))
    return problems, taken


def take_rows(model: nn.Module, name: str, tables: Mapping[str, Holder], taken: Iterable[NewRows]) -> None:
    """Write new rows into the model's tables, and say so; say too which ones the file of the adapter lacks.

    Args:
        tables: of `find_tables`.
    """
    for new in taken:
        with torch.no_grad():
            index = torch.tensor(new.rows)
            new.table[index.to(new.table.device)] = new.stored[index].to(new.table)
        warnings.warn(
            f"{_shown(new.rows)} of {new.where}, which {_DRAWN}, are those of the adapter's file from now on",
            stacklevel=3,  # the caller of load_adapter
        )
    held = {id(holder.module.get_parameter(holder.name)) for holder in tables.values()}
    lacking = [holder for _, holder in _needed(model, name) if id(holder.module.get_parameter(holder.name)) not in held]
    for holder in lacking if tables else ():  # PEFT writes the adapted one of two tables only
        warnings.warn(
            f"the vocabulary was resized, and the adapter's file lacks the new rows of {holder.path}.{holder.name}; "
            f"the model keeps its own, which {_DRAWN}",
            stacklevel=3,
        )


def _shown(rows: list[int]) -> str:
    return f"rows {', '.join(map(str, rows[:_SHOWN]))}{', ...' if len(rows) > _SHOWN else ''}"


def _table(holder: Holder) -> Tensor:
    """Return a holder's parameter, even if it is divided or offloaded."""
    return whole(present(holder.module, holder.name).detach())


def _is_codes(holder: Holder) -> bool:
    return isinstance(holder.module, QuantizedModule) and holder.name == "packed"


def _different_rows(own: Tensor, stored: Tensor) -> list[int]:
    narrower = min(own.dtype, stored.dtype, key=lambda dtype: dtype.itemsize)  # one of them may be a rounded copy
    differs = own.to(narrower) != stored.to(narrower)
    return torch.nonzero(differs.reshape(len(own), -1).any(1)).flatten().tolist() if own.dim() else [0] * bool(differs)


def _embeddings(model: nn.Module) -> Iterator[Holder]:
    """Yield who holds the tables of the input and the output embedding that a model names."""
    modules = [named_embedding(model, method) for method in ("get_input_embeddings", "get_output_embeddings")]
    for module in modules:
        yield from (one for one in Ties(model).every() if one.module is module and one.name == "weight")


def _trained_rows(modules: Mapping[str, AdapterModule], holder: Holder, name: str, number: int) -> set[int]:
    """Return the rows of a table that an adapter trains."""
    for path, module in modules.items():
        copied = module.in_file(name) if isinstance(module, SavedModule) else ()
        is_copy = any(f"{path}.{key}" == f"{holder.path}.{holder.name}" for key in copied)
        if is_copy or (path == holder.path and isinstance(module, TiedModule)):
            return set(range(number))
        if path == holder.path and isinstance(module, TrainedTokens):
            return set(module.tokens[name])
    return set()
