"""The rules of docstrings, as functions over source text: public code says what it does, and what shapes it takes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from source_rules import Breach, Function, House, Sources, house_of

# PyTorch defines what these do; the class says what is special.
TORCH_METHODS = frozenset({"forward", "backward", "setup_context", "extra_repr", "step"})

WORD = r"[A-Za-z0-9_]+(?:[ ][a-z]+)?"  # "tokens", "trained tokens"
DIMENSION = rf"(?:\.\.\.|\*?{WORD}(?:[ ]?(?:[-+*/·×^]|//)[ ]?{WORD})*)"
SHAPE = re.compile(
    rf"""
    (?<!\w)\({DIMENSION}(?:,\s*{DIMENSION})*,\s*(?:{DIMENSION})?\)   # (tokens, r), (tokens,), (..., hidden)
    | (?<!\w)\(\)                                                    # of a single number
    | \b(?:shapes?|shaped|scalars?)\b                         # any shape, a scalar, of x's shape
    """,
    re.VERBOSE,
)
DTYPE = re.compile(r"\b(?:dtypes?|fp64|fp32|fp16|bf16|float(?:64|32|16)|bfloat16|u?int(?:8|16|32|64)|bool|bytes)\b")


@dataclass(frozen=True)
class Definition:
    """A public class, function or method with what is around it.

    Attributes:
        name: with its class's, "Linear4bit.forward".
        owner: the class of a method.
    """

    name: str
    node: Function | ast.ClassDef
    path: str
    owner: ast.ClassDef | None = None

    @property
    def text(self) -> str:
        """Its docstring, or ""."""
        return ast.get_docstring(self.node) or ""


def public_definitions(house: House) -> Iterator[Definition]:
    """Yield the public classes and functions of all modules, and the public methods of public classes."""
    for module, tree in house.trees.items():
        for node in tree.body:
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
                yield Definition(node.name, node, house.paths[module])
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                for inner in node.body:
                    if isinstance(inner, Function) and not inner.name.startswith("_") and not is_stub(inner):
                        yield Definition(f"{node.name}.{inner.name}", inner, house.paths[module], node)


def is_stub(node: Function) -> bool:
    """Return whether a function repeats a documented one: an overload, or a property's setter."""
    decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    return bool(decorators & {"overload", "setter", "deleter"})


def documented_methods(house: House) -> dict[str, dict[str, str]]:
    """Return class name -> method -> docstring, the methods that it inherits from classes of ours included."""
    own: dict[str, dict[str, str]] = {}
    bases: dict[str, list[str]] = {}
    for tree in house.trees.values():
        for node in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            texts = {inner.name: ast.get_docstring(inner) for inner in node.body if isinstance(inner, Function)}
            own.setdefault(node.name, {}).update({name: text for name, text in texts.items() if text})
            bases.setdefault(node.name, []).extend(base_names(node))
    for _ in own:  # as many rounds as a chain of classes can be long
        grown = {name: inherited(bases[name], own) | methods for name, methods in own.items()}
        if grown == own:
            break
        own = grown
    return own


def inherited(bases: Sequence[str], documented: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return method -> docstring of all base classes, the first one's where several have a method."""
    return {name: text for base in reversed(bases) for name, text in documented.get(base, {}).items()}


def base_names(node: ast.ClassDef) -> list[str]:
    """Return the names of a class's bases, without modules and type arguments."""
    return [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases]


def missing_breaches(sources: Sources) -> Iterator[Breach]:
    """Yield the modules, public classes, functions and methods without a docstring.

    What PyTorch or a base class of ours defines and documents needs none where it is overridden.
    """
    house = house_of(sources)
    for module, tree in house.trees.items():
        if not ast.get_docstring(tree):
            yield Breach(house.paths[module], 1, "the module has no docstring")
    documented = documented_methods(house)
    for found in public_definitions(house):
        method = found.name.rpartition(".")[2]
        defined_above = found.owner is not None and (
            method in TORCH_METHODS or method in inherited(base_names(found.owner), documented)
        )
        if not found.text and not defined_above:
            yield Breach(found.path, found.node.lineno, f"{found.name} has no docstring")


def shape_breaches(sources: Sources, with_dtypes: Sequence[str], definitions: Sequence[str]) -> Iterator[Breach]:
    """Yield the public functions and methods with tensors in their signature whose docstring states no shape.

    A shape is a tuple of dimensions, `(tokens, r)` or `()`, or the word: "any shape", "a scalar". A method's shapes may
    stand in its class's docstring, or in that of the method that it overrides.

    Args:
        with_dtypes: beginnings of paths below which the docstring has to name a dtype as well.
        definitions: beginnings of paths whose functions define operations. They document the backends' functions of the
            same name below the same folder.
    """
    house = house_of(sources)
    methods, defined = documented_methods(house), set[tuple[str, str]]()
    found = list(public_definitions(house))
    for one in found:
        if one.path.startswith(tuple(definitions)) and SHAPE.search(one.text):
            defined.add((one.path.partition("/")[0], one.name))
    for one in found:
        if isinstance(one.node, ast.ClassDef) or not takes_tensors(one.node):
            continue
        if not one.path.startswith(tuple(definitions)) and (one.path.partition("/")[0], one.name) in defined:
            continue
        text = one.text
        if one.owner is not None:
            above = inherited(base_names(one.owner), methods).get(one.name.rpartition(".")[2], "")
            text = "\n".join([text, ast.get_docstring(one.owner) or "", above])
        if not SHAPE.search(text):
            yield Breach(one.path, one.node.lineno, f"{one.name} states no shape")
        elif one.path.startswith(tuple(with_dtypes)) and not DTYPE.search(text):
            yield Breach(one.path, one.node.lineno, f"{one.name} states no dtype")


def takes_tensors(node: Function) -> bool:
    """Return whether a tensor is among a function's arguments or results."""
    given = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    annotations = [argument.annotation for argument in given] + [node.returns]
    return any(annotation and re.search(r"\bTensor\b", ast.unparse(annotation)) for annotation in annotations)
