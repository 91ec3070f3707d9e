"""Pictures are drawn, and what cannot be drawn is said before anything is measured."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness.plot import Picture, draw, file_to_draw

PICTURE = Picture(
    "milliseconds",
    {"4096 x 4096": {"lorakit": 1.6, "bitsandbytes": 10.0, "torchao": 34.0}, "2048 x 2048": {"lorakit": 0.3}},
    {"4096 x 4096": {"limit": 1.3, "copy": 2.1}},
)


def words_of(file: Path) -> str:
    """The labels of an SVG, which matplotlib keeps as comments beside their outlines."""
    return "\n".join(re.findall(r"<!-- (.*?) -->", file.read_text()))


def test_an_svg_names_groups_peers_limits_and_numbers(tmp_path: Path) -> None:
    draw(PICTURE, "Dequantizing", tmp_path / "a.svg")
    words = words_of(tmp_path / "a.svg").splitlines()
    for label in ("4096 x 4096", "2048 x 2048", "lorakit", "bitsandbytes", "torchao", "limit", "copy", "1.6", "34"):
        assert label in words
    assert "Dequantizing" in words and "milliseconds, logarithmic" in words
    assert words.count("lorakit") == 1  # once in the legend, however many groups


def test_near_numbers_have_a_linear_axis_from_zero(tmp_path: Path) -> None:
    draw(Picture("ms", {"a": {"x": 1.0, "y": 2.0}}), "t", tmp_path / "a.svg")
    words = words_of(tmp_path / "a.svg").splitlines()
    assert "ms" in words and not any("logarithmic" in word for word in words)


def test_a_png_is_one(tmp_path: Path) -> None:
    draw(PICTURE, "Dequantizing", tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_the_same_figures_give_the_same_svg(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw(PICTURE, "Dequantizing", tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    ("name", "message"), [("a.pdf", "must end in .png or .svg"), ("no/such/a.svg", "no folder 'no/such'")]
)
def test_files_that_cannot_be_drawn(name: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        file_to_draw(name)


def test_without_matplotlib_it_says_what_to_install_and_measures_nothing() -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "sys.argv = ['bench/kernels/dequantize.py', '--plot', 'a.svg']\n"
        "from bench.kernels import dequantize\n"
        "dequantize.main()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout
    assert "--plot: drawing needs matplotlib: pip install" in result.stderr
