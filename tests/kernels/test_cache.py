"""The cache folder, and the lock on a file in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from lorakit_kernels.cache import cache_folder, exclusive_lock

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="symbolic links and flock")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG")
def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORAKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/x")
    assert cache_folder() == Path("/home/x/.cache/lorakit")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/lorakit")
    monkeypatch.setenv("LORAKIT_CACHE", "~/mine")
    assert cache_folder() == Path("/home/x/mine")
    monkeypatch.setenv("LORAKIT_CACHE", "")
    assert cache_folder() == Path("/cache/lorakit")


@POSIX
def test_a_lock_is_not_followed_to_where_a_link_points(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("content")
    (tmp_path / "lock").symlink_to(precious)
    with pytest.raises(OSError, match="lock"), exclusive_lock(tmp_path / "lock"):
        pass
    assert precious.read_text() == "content"
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="dangling"), exclusive_lock(tmp_path / "dangling"):
        pass
    assert not (tmp_path / "nowhere").exists()


def test_a_lock_makes_its_folder_and_leaves_what_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with exclusive_lock(path):
        assert path.read_text() == ""
    path.write_text("content")
    with exclusive_lock(path):
        pass
    assert path.read_text() == "content"


@POSIX
def test_another_process_waits_until_the_lock_is_free(tmp_path: Path) -> None:
    path, done = tmp_path / "lock", tmp_path / "done"
    program = (
        "import sys; from pathlib import Path; from lorakit_kernels.cache import exclusive_lock\n"
        f"print('started', flush=True)\n"
        f"with exclusive_lock(Path({str(path)!r})): Path({str(done)!r}).touch()\n"
    )
    with exclusive_lock(path):
        other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None and other.stdout.readline() == "started\n"
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=1)
        assert not done.exists()
    other.communicate()
    assert other.returncode == 0 and done.exists()
