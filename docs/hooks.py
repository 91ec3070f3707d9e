"""What the site builds from the code, so that it cannot drift: recipe keys, public names, linked sources, code colors.

MkDocs calls the `on_` functions. A setting without a meaning fails the build.
"""

from __future__ import annotations

import datetime
import re
import types
import typing
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments.formatters import HtmlFormatter

import lorakit
from lorakit.evaluation.metrics import METRICS, MetricConfig
from lorakit.runs.recipe import HANDED_DOWN, Recipe
from lorakit.settings import Settings

RECIPE_MARK = "<!-- recipe keys -->"
METRICS_MARK = "<!-- metrics -->"
NAMES_MARK = "<!-- public names -->"
ROOT = Path(__file__).parents[1]
SOURCE_LINK = re.compile(r"\]\((?:\.\./)+((?:lorakit|kernels)/[\w/]+\.py)\)")  # as it works in the repository


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the style sheet that colors code, for light and dark pages, and the source files that pages link to."""
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs("[data-bs-theme=dark] .highlight")
    files.append(File.generated(config, "pygments.css", content=f"{light}\n{dark}\n"))
    linked = {path for file in files.documentation_pages() for path in SOURCE_LINK.findall(file.content_string)}
    for path in sorted(linked):
        files.append(File.generated(config, f"source/{path}.txt", content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the generated parts of a page, and lead its links to source files to their copies in the site."""
    for mark, build in ((RECIPE_MARK, _recipe_keys), (METRICS_MARK, _metrics), (NAMES_MARK, _public_names)):
        if mark in markdown:
            markdown = markdown.replace(mark, "\n".join(build()))
    up = "../" * page.file.src_uri.count("/")
    return SOURCE_LINK.sub(lambda link: f"]({up}source/{link[1]}.txt)", markdown)


def _recipe_keys(section: type[Settings] = Recipe, prefix: str = "") -> Iterator[str]:
    """Yield a table of a section's own keys, then each section below it."""
    nested = {name: kind for name, field in section.model_fields.items() if (kind := _section(field.annotation))}
    yield f"\n## {prefix.removesuffix('.') or 'Top level'}\n"
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    for name, field in section.model_fields.items():
        if prefix == "train." and name in HANDED_DOWN:
            continue  # said by the recipe itself
        kind = "section" if name in nested else _type_name(field.annotation)
        default = "**required**" if field.is_required() else _default(field.get_default(call_default_factory=True))
        key = f"{prefix}{name}"
        if name in nested and field.description is None:
            meaning = f"see [{key}](#{key.replace('.', '')})"
        else:
            meaning = _meaning(section, name, field.description)
        yield f"| `{key}` | {kind} | {default} | {meaning} |"
    for name, kind in nested.items():
        yield from _recipe_keys(kind, f"{prefix}{name}.")


def _metrics() -> Iterator[str]:
    yield from ("| kind | further keys | called | from 0 to | a row scores |", "|---|---|---|---|---|")
    for kind, metric in METRICS.items():
        fields = metric.parameters.model_fields
        keys = [field.alias or name for name, field in fields.items() if name not in MetricConfig.model_fields]
        row = (f"`{kind}`", ", ".join(f"`{key}`" for key in keys), f"`{metric.default_name}`", f"{metric.best:g}")
        yield f"| {' | '.join(row)} | {_first_sentence(metric.rows.__doc__)} |"


def _public_names() -> Iterator[str]:
    """Yield a heading per sub-package and an mkdocstrings entry per public name in it."""

    def home(name: str) -> str:
        return f"{getattr(lorakit, name).__module__}.".split(".")[1]

    for package, names in groupby(sorted(lorakit.__all__, key=lambda name: (home(name), name.lower())), key=home):
        yield f"\n## {package.capitalize()}\n"
        yield from (f"\n::: lorakit.{name}\n" for name in names)


def _section(annotation: Any) -> type[Settings] | None:
    kinds = [kind for kind in _alternatives(annotation) if isinstance(kind, type) and issubclass(kind, Settings)]
    return kinds[0] if kinds else None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _type_name(annotation: Any) -> str:
    """Return a type in words: "list of text or text", "`nf4` or `fp4` or null"."""
    return " or ".join(_simple_type_name(kind) for kind in _alternatives(annotation))


def _simple_type_name(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin is typing.Annotated:
        return _type_name(inner[0])
    if origin in (list, dict, tuple):
        words = [_type_name(item) for item in inner]
        return {list: f"list of {words[0]}", dict: f"map of {' to '.join(words)}", tuple: ", ".join(words)}[origin]
    names = {str: "text", bool: "true or false", int: "integer", float: "number", Path: "path", type(None): "null"}
    names |= {datetime.date: "date"}
    return "metric" if kind is MetricConfig else names[kind]


def _default(value: Any) -> str:
    if isinstance(value, Settings):
        return "its defaults"
    texts = {None: "null", True: "true", False: "false"}
    if isinstance(value, list | tuple):
        return "`[" + ", ".join(str(getattr(item, "kind", item)) for item in value) + "]`"
    return f"`{texts[value] if value is None or isinstance(value, bool) else value}`"


def _meaning(section: type[Settings], name: str, description: str | None) -> str:
    """Return a field's description, or its entry under "Attributes:" in the class docstring."""
    for line in (section.__doc__ or "").splitlines():
        key, colon, text = line.strip().partition(": ")
        if description is None and colon and key == name:
            description = text
    if description is None:
        raise PluginError(f"{section.__name__}.{name} has no description; the recipe's reference needs one")
    return description.rstrip(".").replace("|", r"\|")


def _first_sentence(docstring: str | None) -> str:
    return (docstring or "").strip().split(".\n")[0].split(". ")[0].rstrip(".").replace("|", r"\|")
