"""The rules of the house as functions over source text: path -> source in, breaches out. Nothing of it is imported.

A path is relative to the repository's root ("lorakit/layers/frozen/norm.py"). test_architecture.py holds the table of
what is allowed, and applies the rules to the tree; test_source_rules.py applies each to a planted breach.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath

Sources = Mapping[str, str]
"""Path -> text."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Breach:
    """What breaks a rule, and where.

    Attributes:
        what: in words; without the line, so that it stays the same when lines move.
    """

    path: str
    line: int
    what: str

    @property
    def key(self) -> str:
        """How a list of known breaches names it."""
        return f"{self.path}: {self.what}"

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


@dataclass(frozen=True)
class Import:
    """One import of a module of ours.

    Attributes:
        module: that is imported from.
        name: that is taken from it; "" where the module itself is taken.
        bound: name in the importing file.
        late: whether it stands inside a function.
    """

    module: str
    name: str
    bound: str
    line: int
    late: bool


class House:
    """Parsed sources by module name: "lorakit/layers/__init__.py" is `lorakit.layers`."""

    def __init__(self, sources: Sources) -> None:
        python = {path: text for path, text in sources.items() if path.endswith(".py")}
        self.paths = {module_name(path): path for path in python}
        self.trees = {module_name(path): ast.parse(text, path) for path, text in python.items()}
        self.imports = {module: list(self._imports_of(module)) for module in self.trees}

    def _imports_of(self, importer: str) -> Iterator[Import]:
        package = self.paths[importer].endswith("__init__.py")
        late = {
            id(inner)
            for node in ast.walk(self.trees[importer])
            if isinstance(node, Function)
            for inner in ast.walk(node)
        }
        for node in ast.walk(self.trees[importer]):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in self.trees:
                        yield Import(alias.name, "", alias.asname or alias.name, node.lineno, id(node) in late)
            elif isinstance(node, ast.ImportFrom):
                source = absolute(importer, package, node.level, node.module)
                for alias in node.names:
                    bound = alias.asname or alias.name
                    if f"{source}.{alias.name}" in self.trees:
                        yield Import(f"{source}.{alias.name}", "", bound, node.lineno, id(node) in late)
                    elif source in self.trees:
                        yield Import(source, alias.name, bound, node.lineno, id(node) in late)


def house_of(sources: Sources) -> House:
    """Return the parsed sources; the same ones are parsed once for all rules, which only read the trees."""
    return _house_of(tuple(sources.items()))


@cache
def _house_of(sources: tuple[tuple[str, str], ...]) -> House:
    return House(dict(sources))


def module_name(path: str) -> str:
    """Return the name by which a file is imported."""
    parts = PurePosixPath(path.removeprefix("kernels/")).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def absolute(importer: str, package: bool, level: int, module: str | None) -> str:
    """Return the full name of the module that `from ..module import` names in `importer`."""
    if not level:
        return module or ""
    parts = importer.split(".")
    parts = parts[: len(parts) - level + package]
    return ".".join([*parts, *([module] if module else [])])


# ---- who may import whom -------------------------------------------------------------------------------------------


def place_in(module: str, order: Sequence[Sequence[str]]) -> int | None:
    """Return the number of the floor that a module is on: that of the longest name that it begins with.

    "lorakit.__init__" names the package's own file alone.
    """
    whole = f"{module}.__init__."
    found = {name: number for number, names in enumerate(order) for name in names if whole.startswith(f"{name}.")}
    return found[max(found, key=len)] if found else None


def floor_breaches(sources: Sources, floors: Sequence[Sequence[str]]) -> Iterator[Breach]:
    """Yield the imports that go up, and the modules that are on no floor."""
    house = house_of(sources)
    for importer, path in house.paths.items():
        own = place_in(importer, floors)
        if own is None:
            yield Breach(path, 1, f"{importer} is on no floor")
            continue
        for imported in house.imports[importer]:
            other = place_in(imported.module, floors)
            if other is not None and other > own:
                yield Breach(path, imported.line, f"imports {imported.module} from a floor above")


def room_breaches(sources: Sources, rooms: Mapping[str, Sequence[Sequence[str]]]) -> Iterator[Breach]:
    """Yield a room's imports from a room of the same package that is listed after it, or from the package itself.

    A room is a folder, or a file by its name. Files beside the rooms are not bound, and the package's `__init__` shows
    what is in them all: so a room takes what it needs from the file that has it.
    """
    house = house_of(sources)
    for package, order in rooms.items():
        named = [[f"{package}.{room}" for room in group] for group in order]
        for importer, path in house.paths.items():
            if not importer.startswith(f"{package}."):
                continue
            own = place_in(importer, named)
            for imported in house.imports[importer] if own is not None else ():
                other = place_in(imported.module, named)
                if imported.module == package:
                    yield Breach(path, imported.line, f"imports {imported.name} from {package}, not from its file")
                elif other is not None and own is not None and other > own:
                    yield Breach(path, imported.line, f"imports {imported.module} from a room above")


def circle_breaches(sources: Sources, late: Mapping[tuple[str, str], str]) -> Iterator[Breach]:
    """Yield one breach for each circle of imports, named by its shortest way round.

    Imports for type checkers count. Those inside functions count too, but for the pairs (importer, imported) in `late`,
    each with its reason.
    """
    house = house_of(sources)
    arrows = {
        module: {
            imported.module: imported.line
            for imported in imports
            if imported.module != module and not (imported.late and (module, imported.module) in late)
        }
        for module, imports in house.imports.items()
    }
    seen: set[str] = set()
    for module in sorted(arrows):
        circle = shortest_way_back(module, arrows)
        if circle and not seen.intersection(circle):
            seen.update(circle)
            yield Breach(
                house.paths[module], arrows[module][circle[1]], f"imports in a circle: {' -> '.join(circle[1:])}"
            )


def shortest_way_back(start: str, arrows: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return the shortest path from a module back to itself; [] where there is none."""
    ways, reached = [[start]], {start}
    while ways:
        longer = []
        for way in ways:
            for target in sorted(arrows[way[-1]]):
                if target == start:
                    return [*way, start]
                if target not in reached:
                    reached.add(target)
                    longer.append([*way, target])
        ways = longer
    return []


def private_breaches(sources: Sources) -> Iterator[Breach]:
    """Yield the imports of a private name, and the uses of a private attribute of a module, from another module."""
    house = house_of(sources)
    for importer, path in house.paths.items():
        modules = {}
        for imported in house.imports[importer]:
            if not imported.name:
                modules[imported.bound] = imported.module
            for name in (imported.name, imported.module.rpartition(".")[2]):
                if is_private(name) and imported.module != importer:
                    yield Breach(path, imported.line, f"imports the private name {name} of {imported.module}")
        for node in ast.walk(house.trees[importer]):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                owner = ast.unparse(node.value)
                if owner in modules:
                    yield Breach(path, node.lineno, f"uses the private name {node.attr} of {modules[owner]}")


def is_private(name: str) -> bool:
    """Return whether a name is private: `_x`, but not `__init__`."""
    return name.startswith("_") and not name.endswith("__")


def public_names(source: str) -> list[str]:
    """Return what `__all__` of a source lists.

    Raises:
        ValueError: it has none.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise ValueError("there is no __all__")


# ---- sizes ---------------------------------------------------------------------------------------------------------


def length_breaches(sources: Sources, most: int) -> Iterator[Breach]:
    """Yield the files that are too long."""
    for path, text in sources.items():
        if (lines := len(text.splitlines())) > most:
            yield Breach(path, lines, f"is longer than {most} lines")


def folder_breaches(sources: Sources, most: int) -> Iterator[Breach]:
    """Yield the folders that have too many files side by side; `__init__.py` does not count."""
    files = Counter(str(PurePosixPath(path).parent) for path in sources if not path.endswith("/__init__.py"))
    for folder, count in files.items():
        if count > most:
            yield Breach(folder, 1, f"has more than {most} files")


def argument_breaches(sources: Sources, most: int, registration: str) -> Iterator[Breach]:
    """Yield the functions with too many positional arguments; self and keyword-only ones do not count.

    Args:
        registration: pattern of the calls and decorators that register an operation, whose schema has one argument for
            each tensor. Functions that they decorate, or are given by name, are left out.
    """
    house = house_of(sources)
    for module, path in house.paths.items():
        tree = house.trees[module]
        methods = {id(node) for owner in ast.walk(tree) if isinstance(owner, ast.ClassDef) for node in owner.body}
        registered = set(registered_names(tree, registration))
        for node in ast.walk(tree):
            if isinstance(node, Function) and node.name not in registered:
                names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
                count = len(names) - (id(node) in methods and names[:1] in (["self"], ["cls"]))
                if count > most:
                    yield Breach(path, node.lineno, f"{node.name} takes more than {most} positional arguments")


def registered_names(tree: ast.AST, registration: str) -> Iterator[str]:
    """Yield the names of the functions that are registered as operations, or given to what registers one."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            called = (ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list)
            if any(re.fullmatch(registration, name.rpartition(".")[2]) for name in called):
                yield node.name
        elif isinstance(node, ast.Call) and re.fullmatch(registration, ast.unparse(node.func).rpartition(".")[2]):
            given = (*node.args, *(keyword.value for keyword in node.keywords))
            yield from (argument.id for argument in given if isinstance(argument, ast.Name))


def twice_defined_breaches(sources: Sources, allowed: Mapping[str, str]) -> Iterator[Breach]:
    """Yield the public classes whose name an earlier file has for another class, but for those `allowed`."""
    house, first = house_of(sources), dict[str, str]()
    for module, path in sorted(house.paths.items()):
        for node in house.trees[module].body:
            if isinstance(node, ast.ClassDef) and not is_private(node.name) and node.name not in allowed:
                if node.name in first:
                    yield Breach(path, node.lineno, f"class {node.name} is in {first[node.name]} too")
                first.setdefault(node.name, path)
