"""Strict YAML that remembers lines: the settings of a recipe file, and the line of each.

PyYAML alone silently keeps the last of repeated keys, reads `1e-4` as text and forgets where a value came from. People
write recipes by hand, so all three matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError


class _Loader(yaml.SafeLoader):
    """The safe loader, with YAML 1.2's floats; PyYAML follows 1.1, which needs the dot and the sign of 1.0e-4."""


class _Dumper(yaml.SafeDumper):
    """The safe dumper, which puts text into quotes if `_Loader` would read it as a number."""


_FLOAT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def dump_yaml(values: dict[str, Any]) -> str:
    """Return settings as YAML that `read_yaml` reads back as they are."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    if "\x85" in text:  # PyYAML writes U+0085 in a form that it reads back as blanks
        text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120)
    return text


@dataclass
class YamlSource:
    """Nested settings and the place where each key was set.

    Attributes:
        name: the source's name in messages: the file's path.
        values: the settings, as plain dicts, lists and scalars.
        places: dotted key -> where it was set, as "recipe.yaml:12" or "override 'train.lr=1'".
        problems: (place, dotted key, message) of every fault found while reading: repeated keys, malformed overrides.
    """

    name: str
    values: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str, str]] = field(default_factory=list)

    def place(self, key: str) -> str:
        """Return the place where `key`, or the section around it, was set; the source's name if neither was."""
        while key:
            if key in self.places:
                return self.places[key]
            key = key.rpartition(".")[0]
        return self.name

    def override(self, assignment: str) -> None:
        """Set one nested key from "section.key=value", with the value in YAML; add a fault to `problems`."""
        key, equals, text = (part.strip() for part in assignment.partition("="))
        place, parts = f"override '{assignment}'", key.split(".")
        if not equals or not all(parts):
            self.problems.append((place, "", "is not of the form key=value, such as train.lr=1e-4"))
            return
        try:
            value, _ = _parse(text)
        except yaml.YAMLError as error:
            self.problems.append((place, key, f"the value is not YAML: {_sentence(error)}"))
            return
        section = self.values
        for depth, part in enumerate(parts[:-1], 1):
            above = ".".join(parts[:depth])
            if section.get(part) is None:
                section[part] = {}
                self.places[above] = place
            if not isinstance(section[part], dict):
                self.problems.append((place, key, f"'{above}' is a value, not a section; set it whole: {above}=..."))
                return
            section = section[part]
        section[parts[-1]] = value
        self.places[key] = place


def read_yaml(path: Path) -> YamlSource:
    """Read one YAML file whose top level is a mapping.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8 or not YAML (with file:line), or its top level is not a
            mapping. Repeated keys go into the result's `problems` and are reported together with other faults.
    """
    try:
        values, keys = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"{path}:{mark.line + 1 if mark else 1}: is not YAML: {_sentence(error)}") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{path}: expected settings of the form `key: value`, found {found}")
    source = YamlSource(str(path), values)
    for key, line in keys:
        place = f"{path}:{line}"
        if key in source.places:
            source.problems.append((place, key, f"is set twice, first at {source.places[key]}"))
        else:
            source.places[key] = place
    return source


def _parse(text: str) -> tuple[Any, list[tuple[str, int]]]:
    """Return the value and every key in it as (dotted key, line), repeated keys included."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        keys = list(_keys(node, "", []))
        return loader.construct_document(node), keys
    finally:
        loader.dispose()


def _keys(node: yaml.Node, prefix: str, above: list[yaml.Node]) -> Iterator[tuple[str, int]]:
    """Yield (dotted key, line), depth first; `above` holds the enclosing nodes, to refuse an endless anchor."""
    if node in above:
        raise yaml.MarkedYAMLError(problem="an anchor contains itself", problem_mark=node.start_mark)
    if isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            if key_node.tag not in _KEY_TAGS:
                raise yaml.MarkedYAMLError(problem="a key must be text (quote it)", problem_mark=key_node.start_mark)
            yield f"{prefix}{key_node.value}", key_node.start_mark.line + 1
            yield from _keys(value, f"{prefix}{key_node.value}.", [*above, node])
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _keys(value, f"{prefix}{index}.", [*above, node])


def _sentence(error: yaml.YAMLError) -> str:
    """Return PyYAML's own words without its many lines of context."""
    words = (getattr(error, "context", None), getattr(error, "problem", None))
    return ", ".join(word for word in words if word) or str(error).splitlines()[0]
