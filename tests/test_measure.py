"""Peak memory: in MiB, of this process alone, never falling."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lorakit.measure import peak_rss_mb


def test_a_large_tensor_shows_and_the_peak_stays() -> None:
    before = peak_rss_mb()
    assert 50 < before < 100_000
    script = (
        "import torch; from lorakit.measure import peak_rss_mb; a = peak_rss_mb(); x = torch.ones(25 * 2**20); "
        "b = peak_rss_mb(); del x; print(b - a, peak_rss_mb() - b)"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    grown, later = map(float, output.split())
    assert 95 < grown < 130 and abs(later) < 2  # the kernel counts in batches


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork")
def test_a_child_does_not_inherit_its_parents_peak() -> None:
    ballast = torch.ones(50 * 2**20)
    parent = peak_rss_mb()
    script = "from lorakit.measure import peak_rss_mb; print(peak_rss_mb())"
    child = float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert len(ballast) and child < parent
