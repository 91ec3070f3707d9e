"""docs/explanation/paper-in-code.md against the sources: quoted lines, symbols, chains of calls, and the core's size.

Run as `python tests/test_paper_in_code.py` to write the sizes of the core's files into the page.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "explanation" / "paper-in-code.md"
MOST_CORE_LINES, MOST_HOPS = 3000, 2

QUOTE = re.compile(
    r"^\[`(?P<path>[^`]+)`\]\((?P<link>[^)]+)\), `(?P<name>[^`]+)`:\n\n```python\n(?P<code>.*?)\n```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\[`([^`]+\.py)`\]\(([^)]+)\)")
CORE_ROW = re.compile(r"^\| (\[`([^`]+)`\]\([^)]+\)) \| ([\d,]+) \|$", re.MULTILINE)
CORE_TOTAL = re.compile(r"^\| \*\*total\*\* \| \*\*([\d,]+)\*\* \|$", re.MULTILINE)
CHAIN_ROW = re.compile(r"^\| (?P<item>[^|]+) \| (?P<chain>`[^|]+`) \| (?P<hops>\d+) \|$", re.MULTILINE)
CHAIN_NAME = re.compile(r"`([^`]+)`(?: \(`([^`]+)`\))?")
REASON = re.compile(r"^- ([^:]+):", re.MULTILINE)


# ---- what the sources define -----------------------------------------------------------------------------------------


def definitions(source: str) -> dict[str, str]:
    """Return the functions, classes and module-level names of a source: qualified name -> its text."""
    found: dict[str, str] = {}
    lines = source.splitlines()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign) and not prefix:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            else:
                continue
            for name in names:
                found[prefix + name] = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(source).body, "")
    return found


@cache
def library() -> dict[str, list[str]]:
    """Return what lorakit and the operations' definitions define: qualified name -> the texts of that name."""
    kernels = ROOT / "kernels" / "lorakit_kernels"
    files = [*(ROOT / "lorakit").rglob("*.py"), *kernels.glob("*.py"), *(kernels / "ops").glob("*.py")]
    found: dict[str, list[str]] = {}
    for file in files:
        for name, text in definitions(file.read_text(encoding="utf-8")).items():
            found.setdefault(name, []).append(text)
    return found


# ---- quoted lines ----------------------------------------------------------------------------------------------------


class Quote(NamedTuple):
    """A block of code on the page; "..." in it stands for lines left out."""

    path: str
    link: str
    name: str
    code: str
    symbols: list[str]

    def __str__(self) -> str:
        return f"{self.path}: {self.name}"


def quotes(page: str) -> list[Quote]:
    found = []
    for match in QUOTE.finditer(page):
        paragraph = page[match.end() :].lstrip("\n").split("\n\n")[0]
        symbols = re.findall(r"`([^`]+)`", paragraph) if paragraph.startswith("Here ") else []
        found.append(Quote(match["path"], match["link"], match["name"], match["code"], symbols))
    return found


def plain(text: str) -> list[str]:
    """Return the lines without white space around them, and without empty ones."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def stands_in(code: str, text: str) -> bool:
    """Return whether lines of code stand in a text, one below the other but for "...", in that order."""
    lines, start = plain(text), 0
    for run in re.split(r"^ *\.\.\.$", code, flags=re.MULTILINE):
        wanted = plain(run)
        places = (at for at in range(start, len(lines)) if lines[at : at + len(wanted)] == wanted)
        if (at := next(places, None)) is None:
            return False
        start = at + len(wanted)
    return True


def quote_breaches(page: str, root: Path) -> Iterator[str]:
    for quote in quotes(page):
        target = (PAGE.parent / quote.link).resolve()
        if target != ROOT / quote.path:
            yield f"{quote}: the link leads to {quote.link}"
        file = root / quote.path
        text = definitions(file.read_text(encoding="utf-8")).get(quote.name) if file.is_file() else None
        if text is None:
            yield f"{quote}: there is none"
            continue
        if not stands_in(quote.code, text):
            yield f"{quote}: these lines do not stand there:\n{quote.code}"
        for symbol in quote.symbols:
            if not re.search(rf"(?<!\w){re.escape(symbol)}(?!\w)", text):
                yield f"{quote}: `{symbol}` is not there"


# ---- chains of calls -------------------------------------------------------------------------------------------------


class Chain(NamedTuple):
    """A row of the table of hops: each name, and the table through which it leads to the next, or ""."""

    item: str
    names: list[tuple[str, str]]
    hops: int


def chains(page: str) -> list[Chain]:
    return [Chain(m["item"], CHAIN_NAME.findall(m["chain"]), int(m["hops"])) for m in CHAIN_ROW.finditer(page)]


def public_part(name: str) -> str:
    """Return a public name without its package: "LoRALinear.forward" for "lk.LoRALinear.forward".

    Raises:
        ValueError: the package does not export it.
    """
    *packages, last = name.replace("lk.", "lorakit.", 1).split(".")
    rest = [last]
    while packages and not (ROOT.joinpath(*packages) / "__init__.py").is_file():
        rest.insert(0, packages.pop())
    exported = definitions((ROOT.joinpath(*packages) / "__init__.py").read_text(encoding="utf-8")).get("__all__", "")
    if not packages or f'"{rest[0]}"' not in exported:
        raise ValueError(f"`{name}` is not public")
    return ".".join(rest)


def calls(texts: list[str], name: str) -> bool:
    """Return whether one of the texts calls a function, a method, or the forward of an autograd function."""
    owner, _, last = name.rpartition(".")
    pattern = rf"\.{last}\(|\b{owner}\.apply\(" if owner else rf"\b{last}\("
    return any(re.search(pattern, text.partition("\n")[2]) for text in texts)


def chain_breaches(page: str) -> Iterator[str]:
    reasons = [reason.lower() for reason in REASON.findall(page)]
    for item, names, hops in chains(page):
        try:
            links = [(public_part(names[0][0]), names[0][1]), *names[1:]]
        except ValueError as error:
            yield f"{item}: {error}"
            continue
        if hops != len(links) - 1:
            yield f"{item}: {hops} hops, and {len(links) - 1} calls"
        if hops > MOST_HOPS and not any(reason in item.lower() for reason in reasons):
            yield f"{item}: {hops} hops, and no reason"
        yield from (f"{item}: there is no `{name}`" for name, _ in links if name not in library())
        for (name, table), (following, _) in pairwise(links):
            texts = library().get(name, [])
            if table and not any(f"{table}[" in text for text in texts):
                yield f"{item}: `{name}` does not read `{table}`"
            if not calls([f"\n{text}" for text in library().get(table, [])] if table else texts, following):
                yield f"{item}: `{table or name}` does not call `{following}`"


# ---- the core --------------------------------------------------------------------------------------------------------


def with_sizes(page: str, root: Path = ROOT) -> str:
    """Return the page with the number of lines of each of the core's files, and their total."""
    total = 0

    def row(match: re.Match[str]) -> str:
        nonlocal total
        size = len((root / match[2]).read_text(encoding="utf-8").splitlines())
        total += size
        return f"| {match[1]} | {size:,} |"

    page = CORE_ROW.sub(row, page)
    return CORE_TOTAL.sub(lambda _: f"| **total** | **{total:,}** |", page)


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_quoted_lines_and_symbols_stand_where_the_page_says(page: str) -> None:
    assert len(quotes(page)) == page.count("```python") > 30
    assert sum(len(quote.symbols) for quote in quotes(page)) > 20
    assert not list(quote_breaches(page, ROOT))


def test_links_lead_to_the_files_they_name(page: str) -> None:
    for label, link in LINK.findall(page):
        assert (PAGE.parent / link).resolve() == ROOT / label and (ROOT / label).is_file(), link


def test_each_chain_of_calls_is_one(page: str) -> None:
    assert len(chains(page)) > 15
    assert not list(chain_breaches(page))


def test_the_core_is_as_small_as_the_page_says(page: str) -> None:
    assert with_sizes(page) == page, "run `python tests/test_paper_in_code.py`"
    total = CORE_TOTAL.search(page)
    assert total is not None and 1000 < int(total[1].replace(",", "")) <= MOST_CORE_LINES


@pytest.mark.parametrize(
    ("old", "new", "breach"),
    [
        ("alpha / rank**0.5 if", "alpha / rank**0.6 if", "LoraConfig.scaling: these lines do not stand there"),
        ("`LoraConfig.scaling`:", "`LoraConfig.factor`:", "LoraConfig.factor: there is none"),
        ("Here `use_rslora`", "Here `use_rs`", "`use_rs` is not there"),
        ("(../../lorakit/adapters/config.py)", "(../../lorakit/config.py)", "the link leads to"),
    ],
)
def test_a_page_that_strays_is_a_breach(page: str, old: str, new: str, breach: str) -> None:
    assert old in page
    assert any(breach in found for found in quote_breaches(page.replace(old, new, 1), ROOT))


def test_a_source_that_strays_is_a_breach(page: str, tmp_path: Path) -> None:
    for path in {quote.path for quote in quotes(page)}:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    assert not list(quote_breaches(page, tmp_path))
    file = tmp_path / "lorakit/layers/frozen/linear4bit.py"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("lora[1].T, alpha=scaling)", "lora[1].T)"), encoding="utf-8")
    (breach,) = quote_breaches(page, tmp_path)
    assert breach.startswith("lorakit/layers/frozen/linear4bit.py: frozen_linear: these lines do not stand there")


@pytest.mark.parametrize(
    ("old", "new", "breach"),
    [
        ("`codebook` (`QUANT_TYPES`) → `normal_float` | 2", "`codebook` → `normal_float` | 2", "does not call"),
        ("`lk.LoraConfig.scaling` | 0", "`lk.LoraConfig.scaling` | 1", "1 hops, and 0 calls"),
        ("`lk.LoraConfig.scaling` | 0", "`lk.Scaling.scaling` | 0", "is not public"),
        ("`lk.LoraConfig.scaling` | 0", "`lk.LoraConfig.factor` | 0", "there is no"),
        ("\n- From the trainer:", "\n- From afar:", "5 hops, and no reason"),
    ],
)
def test_a_chain_that_strays_is_a_breach(page: str, old: str, new: str, breach: str) -> None:
    assert old in page
    assert any(breach in found for found in chain_breaches(page.replace(old, new, 1)))


def test_a_size_that_strays_is_noticed(page: str) -> None:
    row = CORE_ROW.search(page)
    assert row is not None
    assert with_sizes(page.replace(row[0], f"| {row[1]} | 1 |")) == page


if __name__ == "__main__":
    PAGE.write_text(with_sizes(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
