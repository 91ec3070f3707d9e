"""Locks keep other processes out, end with their process, and leave no file and no empty folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.errors import StorageError
from lorakit.locks import claimed, locked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no lock on a folder")

HOLDER = (
    "import sys\n"
    "from pathlib import Path\n"
    "from lorakit.locks import claimed\n"
    "with claimed(Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    sys.stdin.read()\n"
)


def test_another_process_is_kept_out_until_the_first_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="run is being written by another process"), claimed(folder):
            pass
        assert folder.is_dir()
    finally:
        holder.kill()
        holder.communicate()
    with claimed(folder):
        pass


def test_it_is_free_again_afterwards_and_nothing_is_left(tmp_path: Path) -> None:
    for _ in range(2):
        with claimed(tmp_path / "a" / "b"):
            assert (tmp_path / "a" / "b").is_dir()
        assert not (tmp_path / "a").exists()
    with claimed(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_it_can_be_held_once_in_a_process_too(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(StorageError, match="another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("name", ["file/below", "nul\0", "x" * 300])
def test_a_folder_that_cannot_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"), claimed(tmp_path / name):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
