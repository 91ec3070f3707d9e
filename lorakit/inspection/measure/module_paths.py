"""A module's position in its model, read from its path: stack of blocks, block number and kind of module."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Modules of a block as the data flows; files list them alphabetically. Others come after these.
_ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
_NUMBERED = re.compile(r"(?P<stack>.*?)\.?(?<![^.])(?P<index>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class ModulePath:
    """A path taken apart: model.layers.7.self_attn.q_proj has stack "model.layers", index 7, module "q_proj".

    Attributes:
        stack: the path before the first number; "" for a module outside any stack.
        index: that number, or None.
        module: the last name, or the whole path within the block if two modules of a block share their last name.
    """

    stack: str
    index: int | None
    module: str


def module_paths(paths: Iterable[str]) -> dict[str, ModulePath]:
    """Take each path apart."""
    split = {}
    for path in paths:
        match = _NUMBERED.fullmatch(path)
        split[path] = (match["stack"], int(match["index"]), match["rest"]) if match else ("", None, path)
    rests: dict[str, set[str]] = {}
    for _, _, rest in split.values():
        rests.setdefault(rest.rpartition(".")[2], set()).add(rest)
    return {
        path: ModulePath(stack, index, last if len(rests[last := rest.rpartition(".")[2]]) == 1 else rest)
        for path, (stack, index, rest) in split.items()
    }


def in_model_order(paths: Iterable[str]) -> list[str]:
    """Sort the modules of each block as the data flows through them; the blocks are in order already."""
    blocks: dict[tuple[str, int | None], list[str]] = {}
    for path, place in module_paths(paths).items():
        blocks.setdefault((place.stack, place.index), []).append(path)

    def rank(path: str) -> int:
        name = path.rpartition(".")[2]
        return _ORDER.index(name) if name in _ORDER else len(_ORDER)

    return [path for block in blocks.values() for path in sorted(block, key=rank)]
