"""Placing trained copies of modules and biases, and trained rows of tokens; modules that share them follow."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from ...errors import AdapterError
from ...layers import AdapterModule, SavedModule, TiedModule, TrainedTokens
from ...layers.frozen.calls import is_dense, is_elsewhere
from ...layers.frozen.quantized_module import QuantizedModule
from ...layers.saved_module import buffers_in_state
from ...layers.tied_module import Sources
from ..config import LoraConfig
from .placed import Placement
from .targeting import adaptable_layers, match_names, unwrapped
from .ties import Holder, Ties, input_embedding
from .wrappers import find_module, named_modules

_PEFTS_COPY = "modules_to_save."  # PEFT writes a copy under this name as well if the vocabulary was resized
_Module = TypeVar("_Module", SavedModule, TrainedTokens)


def place_saved(model: nn.Module, paths: list[str], config: LoraConfig, ties: Ties) -> list[Placement]:
    """Place a trained copy of each module of modules_to_save, and those who share its weight if they are to follow.

    Raises:
        AdapterError: a module cannot be trained, or the config does not say what becomes of those who share its table.
    """
    placements: dict[str, Placement] = {}
    paths = [path for path in dict.fromkeys(paths) if not any(path.startswith(f"{other}.") for other in paths)]
    for path in paths:
        base = unwrapped(find_module(model, path))
        if any(isinstance(inner, QuantizedModule) for inner in base.modules()):
            raise AdapterError(f"{path} of modules_to_save is in 4 bits, which cannot be trained; load it unquantized")
        check_present(path, base)
        if coded := [key for key, parameter in base.named_parameters() if not is_dense(parameter)]:
            raise AdapterError(
                f"{path}.{coded[0]} of modules_to_save is quantized and cannot be trained; load it unquantized"
            )
        if isinstance(base, nn.ModuleList | nn.ModuleDict):
            kind = type(base).__name__
            raise AdapterError(
                f"{path} of modules_to_save is a {kind}, whose parts are called one by one; name the parts"
            )
        if adapted := [name for name, inner in named_modules(base) if isinstance(inner, AdapterModule)]:
            raise AdapterError(
                f"{path} of modules_to_save holds {path}.{adapted[0]}, which another adapter adapts; remove that one "
                "first"
            )
        source = ties.source(path, base) if config.ensure_weight_tying else path
        if source in placements and isinstance(placements[source].module, SavedModule):
            continue  # it shares all of its parameters with a module that is trained already
        if (follower := next((one for one in placements if f"{one}.".startswith(f"{source}.")), None)) is not None:
            other = placements[follower].follows
            raise AdapterError(f"modules_to_save names {other} and {path}, which share a weight; name one of them")
        module = _module_of_kind(model, source, SavedModule)
        parameters = dict(module.base_layer.named_parameters())
        placements[source] = Placement(
            source,
            module,
            module.shapes(),
            partial(_add_copy, module, None),
            buffers=buffers_in_state(module.base_layer),
            tied=_tied_within(source, module.base_layer),
        )
        followers = ties.outside(source, parameters)
        if config.ensure_weight_tying:
            placements |= {one.path: one for one in _place_followers(model, source, module, followers)}
        elif followers:
            _say_untied(path, base, list(followers), paths, config)
    return list(placements.values())


def check_present(path: str, module: nn.Module) -> None:
    """Raise AdapterError if a module that is to be copied has parameters elsewhere."""
    if any(map(is_elsewhere, module.modules())):
        raise AdapterError(
            f"{path} cannot be copied while its weights are on disk or in host memory; attach adapters first"
        )


def _say_untied(path: str, base: nn.Module, others: list[str], paths: list[str], config: LoraConfig) -> None:
    """Refuse a copy of an embedding without a word about those who share its table, and warn about other copies."""
    if config.ensure_weight_tying is not None:
        return
    left = [other for other in others if not any(f"{other}.".startswith(f"{saved}.") for saved in paths)]
    shares = f"{path} of modules_to_save shares its weight with {', '.join(others)}"
    if left and isinstance(base, nn.Embedding):
        raise AdapterError(
            f"{shares}; set ensure_weight_tying to true (all use the trained copy) or false (the others keep the "
            "base's weight)"
        )
    warnings.warn(
        f"{shares}, and the copy is not tied to them; set ensure_weight_tying to true to train one weight for all, or "
        "to false if you want it so",
        stacklevel=5,  # the caller of add_adapter
    )


def _tied_within(path: str, module: nn.Module) -> dict[str, tuple[str, str]]:
    """Return the further names of parameters that a module holds under several names, and the first one of each."""
    first = {id(parameter): key for key, parameter in module.named_parameters()}
    names = {key: first[id(p)] for key, p in module.named_parameters(remove_duplicate=False)}
    names |= {f"{_PEFTS_COPY}{key}": name for key, name in names.items()}
    return {key: (path, name) for key, name in names.items() if key != name}


def _add_copy(module: SavedModule, parameters: list[str] | None, name: str, dtype: torch.dtype) -> None:
    module.add(name, dtype, parameters)


def place_tokens(model: nn.Module, config: LoraConfig, ties: Ties, is_strict: bool = True) -> list[Placement]:
    """Place the trained rows of trainable_token_indices, and those who share the table.

    Args:
        is_strict: whether each name must match a table.

    Raises:
        AdapterError: there is no such table or token, or two who share a table are to train different rows of it.
    """
    wanted = config.trainable_token_indices
    if not wanted:
        return []
    tables = {p: m for p, m in adaptable_layers(model).items() if isinstance(m, nn.Embedding)}
    tables |= {p: m.base_layer for p, m in named_modules(model) if isinstance(m, TrainedTokens)}
    chosen = _tokens_by_table(model, wanted, tables, is_strict)
    placements: dict[str, Placement] = {}
    for path, tokens in sorted(chosen.items(), key=lambda one: tables[one[0]] is not ties.main):
        table = tables[path]
        if max(tokens, default=0) >= table.num_embeddings or not tokens or len(set(tokens)) < len(tokens):
            raise AdapterError(
                f"trainable_token_indices {tokens} of {path}: expected different tokens below {table.num_embeddings}"
            )
        if not is_dense(table.weight):
            raise AdapterError(f"{path} of trainable_token_indices is quantized, and its rows cannot be trained")
        other = next((p for p, t in chosen.items() if t != tokens and tables[p].weight is table.weight), None)
        if other and config.ensure_weight_tying is not False:
            raise AdapterError(
                f"{path} and {other} share a weight, and trainable_token_indices names other tokens for each; name the "
                "same ones, or set ensure_weight_tying to false to train rows of their own"
            )
        # As in PEFT, rows of the input embedding count for all who share it; `False` keeps those of other tables apart.
        is_tied = config.ensure_weight_tying is not False or (ties.main in (None, table) and not other)
        source = ties.source(path, table) if is_tied else path
        if source in placements:
            continue
        module = _module_of_kind(model, source, TrainedTokens)
        add = partial(_add_tokens, module, tokens)
        placements[source] = Placement(source, module, module.shapes(tokens), add)
        if is_tied:
            followers = ties.outside(source, dict(table.named_parameters(recurse=False)))
            placements |= {one.path: one for one in _place_followers(model, source, module, followers)}
    return list(placements.values())


def _tokens_by_table(
    model: nn.Module, wanted: list[int] | dict[str, list[int]], tables: dict[str, nn.Embedding], is_strict: bool
) -> dict[str, list[int]]:
    """Return path of an embedding table -> tokens to train in it; a bare list means the input embedding."""
    if isinstance(wanted, list):
        main = input_embedding(model)
        names = [path for path, table in tables.items() if table is main]
        names += [path for path in tables if path.endswith("embed_tokens")]
        chosen = {names[0]: wanted} if names else {}
    else:
        matched = match_names(wanted, tables)
        is_complete = all(matched.values()) or not is_strict
        chosen = {path: wanted[name] for name, paths in matched.items() for path in paths} if is_complete else {}
    if is_strict and not chosen:
        raise AdapterError(f"trainable_token_indices finds no embedding table (tables here: {', '.join(tables)})")
    return chosen


def _place_followers(
    model: nn.Module,
    source: str,
    module: SavedModule | TrainedTokens,
    followers: Mapping[str, list[tuple[str, Holder]]],
) -> list[Placement]:
    """Place a module that follows the trained values of `module`, at the path `source`, at each that shares them."""
    placements = []
    for path, shared in followers.items():
        holders = [holder for _, holder in shared]
        if not path or holders[0].inside:
            where = f"{path}, a part of {holders[0].inside}, which" if path else "the model itself, which"
            raise AdapterError(f"{source} shares its weight with {where} cannot follow it; remove other adapters first")
        current = find_module(model, path)
        tied = current if isinstance(current, TiedModule) else TiedModule(current)
        sources: Sources = {holder.name: (module, key) for key, holder in shared}
        add = partial(_add_follower, tied, sources)
        # PEFT writes a copy under the name of each module that shares it; rows of tokens only if it resized the table.
        names = {f"{between}{holder.name}": (source, key) for key, holder in shared for between in ("", _PEFTS_COPY)}
        if isinstance(module, TrainedTokens):
            names = {table: (source, table) for table in module.shapes([])}
        placements.append(Placement(path, tied, {}, add, tied=names, follows=source))
    return placements


def _add_follower(module: TiedModule, sources: Sources, name: str, dtype: torch.dtype) -> None:
    module.add(name, sources)


def _add_tokens(module: TrainedTokens, tokens: list[int], name: str, dtype: torch.dtype) -> None:
    module.add(name, tokens, dtype)


def place_biases(model: nn.Module, taken: set[str], ties: Ties) -> list[Placement]:
    """Place a trained copy of each bias, except in the modules at the paths `taken` and inside them.

    Modules that share a bias, as the parts of BERT's head do, follow one copy; a module without submodules has it.

    Raises:
        AdapterError: a module that is adapted otherwise shares a bias.
    """
    shared: dict[int, list[str]] = {}
    for path, module in list(named_modules(model)):
        inner = unwrapped(module)
        is_inside = any(path.startswith(f"{other}.") for other in taken)
        is_inside = is_inside or re.search(r"\.(base_layer|copies)(\.|$)", path) is not None
        bias = inner._parameters.get("bias")
        if path and path not in taken and not is_inside and isinstance(bias, nn.Parameter):
            shared.setdefault(id(bias), []).append(path)
    placements = []
    for paths in shared.values():
        source = min(paths, key=lambda path: any(True for _ in unwrapped(find_module(model, path)).children()))
        saved = _module_of_kind(model, source, SavedModule)
        check_present(source, saved.base_layer)
        placements.append(Placement(source, saved, saved.shapes(["bias"]), partial(_add_copy, saved, ["bias"])))
        followers = ties.outside(source, {"bias": saved.base_layer.get_parameter("bias")})
        if adapted := [other for other in followers if other not in paths]:
            raise AdapterError(
                f"{source} shares its bias with {adapted[0]}, which trains it otherwise; set bias to 'none' or "
                "'lora_only'"
            )
        placements += _place_followers(model, source, saved, followers)
    return placements


def _module_of_kind(model: nn.Module, path: str, kind: type[_Module]) -> _Module:
    """Return the module of a kind that already holds adapters at a path, or a new one around the module there."""
    module = find_module(model, path)
    if isinstance(module, AdapterModule):
        if not isinstance(module, kind):
            raise AdapterError(f"{path} is already a {type(module).__name__} of another adapter; remove that one first")
        return module
    return kind(module)  # type: ignore[arg-type]
