"""Files are whole or absent, whatever goes wrong on the way: exceptions, full disks, kills, things in the way."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorakit.errors import CheckpointError, StorageError
from lorakit.files import atomic_folder, atomic_write, check_space, finite, read_json_object, sha256_file, write_text

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits and modes")


@contextlib.contextmanager
def small_disk() -> Iterator[None]:
    """Within it no file may grow beyond 4096 bytes, that of the tests' own output included: EFBIG, not ENOSPC."""
    import resource

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


class TestOneFile:
    @pytest.mark.parametrize("text", ["", "x\n", "zwölf ↵ \U0001f600\r\n", "long " * 100_000])
    def test_what_was_written_is_there(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "new" / "folder" / "file.txt"
        write_text(path, text)
        assert path.read_bytes() == text.encode().replace(b"\n", os.linesep.encode())
        write_text(str(path), "other")
        assert path.read_text() == "other"
        assert list(path.parent.iterdir()) == [path]

    @POSIX
    def test_it_has_an_ordinary_files_mode(self, tmp_path: Path) -> None:
        write_text(tmp_path / "ours", "")
        (tmp_path / "theirs").write_text("")
        modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "theirs")}
        assert len(modes) == 1

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_an_exception_on_the_way_leaves_the_old(self, error: type[BaseException], tmp_path: Path) -> None:
        write_text(tmp_path / "file", "old")
        with pytest.raises(error), atomic_write(tmp_path / "file") as part:
            part.write_text("half")
            raise error
        assert (tmp_path / "file").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_nobody_sees_it_before_it_is_whole(self, tmp_path: Path) -> None:
        with atomic_write(tmp_path / "file") as part:
            part.write_text("half")
            assert not (tmp_path / "file").exists() and part.name.startswith(".file.")
        assert (tmp_path / "file").read_text() == "half"

    @POSIX
    def test_a_full_disk_leaves_the_old(self, tmp_path: Path) -> None:
        write_text(tmp_path / "file", "old")
        with small_disk(), pytest.raises(StorageError, match=r"write .*file: File too large; it is left as it was"):
            write_text(tmp_path / "file", "x" * 5000)
        assert (tmp_path / "file").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    @POSIX
    def test_also_when_safetensors_writes(self, tmp_path: Path) -> None:
        refused = pytest.raises(StorageError, match="left as it was")
        with small_disk(), refused, atomic_write(tmp_path / "file") as part:
            save_file({"x": torch.zeros(5000)}, part)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("target", ["file/below", "folder", "x" * 300])
    def test_a_target_that_cannot_be(self, target: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        (tmp_path / "folder").mkdir()
        with pytest.raises(StorageError, match="cannot write"):
            write_text(tmp_path / target, "x")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]

    @pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_without_permission(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(StorageError, match="Permission denied"):
            write_text(tmp_path / "file", "x")
        tmp_path.chmod(0o700)


class TestOneFolder:
    def fill(self, folder: Path, **texts: str) -> None:
        with atomic_folder(folder) as part:
            for name, text in texts.items():
                (part / name).write_text(text)

    def contents(self, folder: Path) -> dict[str, str]:
        return {path.name: path.read_text() for path in folder.iterdir()}

    def test_a_new_one_and_one_that_is_replaced(self, tmp_path: Path) -> None:
        folder = tmp_path / "some" / "folder"
        self.fill(folder, a="1", b="2")
        assert self.contents(folder) == {"a": "1", "b": "2"}
        self.fill(folder, a="3")
        assert self.contents(folder) == {"a": "3"}
        assert list(folder.parent.iterdir()) == [folder]

    def test_nested_and_empty_ones(self, tmp_path: Path) -> None:
        with atomic_folder(tmp_path / "x") as part:
            (part / "deep" / "er").mkdir(parents=True)
            (part / "deep" / "file").write_text("1")
        assert (tmp_path / "x" / "deep" / "er").is_dir() and (tmp_path / "x" / "deep" / "file").read_text() == "1"
        self.fill(tmp_path / "empty")
        assert self.contents(tmp_path / "empty") == {}

    @POSIX
    def test_it_and_its_files_have_ordinary_modes(self, tmp_path: Path) -> None:
        with atomic_folder(tmp_path / "ours") as part:
            (part / "file").touch(0o600)  # as some libraries make them
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs" / "file").touch()
        for name in ("", "file"):
            assert (tmp_path / "ours" / name).stat().st_mode == (tmp_path / "theirs" / name).stat().st_mode

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_an_exception_on_the_way_leaves_the_old(self, error: type[BaseException], tmp_path: Path) -> None:
        self.fill(tmp_path / "x", a="1")
        with pytest.raises(error), atomic_folder(tmp_path / "x") as part:
            (part / "a").write_text("2")
            raise error
        assert self.contents(tmp_path / "x") == {"a": "1"}
        assert [path.name for path in tmp_path.iterdir()] == ["x"]

    @POSIX
    def test_a_full_disk_leaves_the_old(self, tmp_path: Path) -> None:
        self.fill(tmp_path / "x", a="1")
        with small_disk(), pytest.raises(StorageError, match="left as it was"):
            self.fill(tmp_path / "x", a="2", b="x" * 5000)
        refused = pytest.raises(StorageError, match="left as it was")
        with small_disk(), refused, atomic_folder(tmp_path / "x") as part:
            save_file({"x": torch.zeros(5000)}, part / "a")
        assert self.contents(tmp_path / "x") == {"a": "1"}
        assert [path.name for path in tmp_path.iterdir()] == ["x"]

    def test_a_file_in_its_place_stays(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_text("mine")
        with pytest.raises(StorageError, match="left as it was"):
            self.fill(tmp_path / "x", a="1")
        assert (tmp_path / "x").read_text() == "mine"
        assert [path.name for path in tmp_path.iterdir()] == ["x"]

    @POSIX
    def test_a_kill_leaves_the_old_or_the_new(self, tmp_path: Path) -> None:
        self.fill(tmp_path / "x", a="old")
        script = (
            "import os, sys\n"
            "from pathlib import Path\n"
            "from lorakit.files import atomic_folder\n"
            "with atomic_folder(sys.argv[1]) as part:\n"
            "    (part / 'a').write_text('half')\n"
            "    os.kill(os.getpid(), 9)\n"
        )
        subprocess.run([sys.executable, "-c", script, str(tmp_path / "x")], check=False)
        assert self.contents(tmp_path / "x") == {"a": "old"}
        self.fill(tmp_path / "x", a="new")  # what the killed one left is not in the way
        assert self.contents(tmp_path / "x") == {"a": "new"}

    def test_a_folder_that_cannot_be_put_in_place_puts_the_old_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.fill(tmp_path / "x", a="old")
        monkeypatch.setattr("lorakit.files._exchanged", lambda first, second: False)  # as on Windows
        real = os.replace

        def fail_for_the_new(source: Path, target: Path) -> None:  # the system's call, as a quota would make it fail
            if str(source).endswith(".part"):
                raise OSError(28, "No space left on device")
            real(source, target)

        monkeypatch.setattr(os, "replace", fail_for_the_new)
        with pytest.raises(StorageError, match="No space left on device; it is left as it was"):
            self.fill(tmp_path / "x", a="new")
        assert self.contents(tmp_path / "x") == {"a": "old"}
        assert [path.name for path in tmp_path.iterdir()] == ["x"]

    @pytest.mark.parametrize("in_one_step", [True, False])
    def test_a_replaced_folder_is_gone_and_open_files_in_it_are_whole(
        self, in_one_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not in_one_step:
            monkeypatch.setattr("lorakit.files._exchanged", lambda first, second: False)
        self.fill(tmp_path / "x", a="old")
        with (tmp_path / "x" / "a").open() as opened:
            self.fill(tmp_path / "x", b="new")
            assert opened.read() == "old"
        assert self.contents(tmp_path / "x") == {"b": "new"}
        assert [path.name for path in tmp_path.iterdir()] == ["x"]

    def test_only_a_folder_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        self.fill(tmp_path / "there", a="1")
        (tmp_path / "link").symlink_to(tmp_path / "there")
        for name in ("file", "link"):
            with pytest.raises(StorageError, match="left as it was"):
                self.fill(tmp_path / name, a="2")
        assert (tmp_path / "file").read_text() == "mine" and self.contents(tmp_path / "there") == {"a": "1"}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "there"]


@POSIX
class TestWhatAKillLeaves:
    def killed(self, tmp_path: Path, writer: str, target: str) -> Path:
        """Kill a process that writes a target; return what it had begun."""
        script = (
            "import os, sys\n"
            f"from lorakit.files import {writer}\n"
            f"with {writer}(sys.argv[1]) as part:\n"
            "    os.kill(os.getpid(), 9)\n"
        )
        subprocess.run([sys.executable, "-c", script, str(tmp_path / target)], check=False)
        (left,) = tmp_path.glob(".*.part")
        return left

    @pytest.mark.parametrize(
        ("writer", "target", "later"),
        [
            ("atomic_folder", "step-000003", "step-000003"),
            ("atomic_folder", "step-000003", "step-000012"),
            ("atomic_write", "metrics.json", "metrics.json"),
        ],
    )
    def test_the_next_write_removes(self, writer: str, target: str, later: str, tmp_path: Path) -> None:
        left = self.killed(tmp_path, writer, target)
        with atomic_folder(tmp_path / later) if writer == "atomic_folder" else atomic_write(tmp_path / later):
            assert not left.exists()
        assert [path.name for path in tmp_path.iterdir()] == [later]

    def test_what_somebody_is_writing_stays(self, tmp_path: Path) -> None:
        with atomic_folder(tmp_path / "step-1") as first, atomic_folder(tmp_path / "step-2") as second:
            (first / "a").write_text("1")
            (second / "b").write_text("2")
        assert (tmp_path / "step-1" / "a").is_file() and (tmp_path / "step-2" / "b").is_file()

    @pytest.mark.parametrize("name", [".merged.abc.part", "step-1.abc.part", ".step-1.part", ".download.tar.part"])
    def test_what_is_not_of_this_target_stays(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).mkdir()
        with atomic_folder(tmp_path / "step-2"):
            pass
        assert (tmp_path / name).is_dir()


def test_no_json_lacks_a_number() -> None:
    value = {"a": [1, math.inf, (math.nan, -math.inf)], "b": {"c": 1.5, "d": "inf", "e": None, "f": True}}
    assert finite(value) == {"a": [1, None, [None, None]], "b": {"c": 1.5, "d": "inf", "e": None, "f": True}}


def test_space_is_that_of_the_disk_below_a_folder_to_come(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path / "to" / "come", free // 2)
    with pytest.raises(StorageError, match=r"come: [\d,]+ bytes are needed, [\d,]+ are free"):
        check_space(tmp_path / "to" / "come", 2 * free)


@pytest.mark.parametrize("content", [b"", b"abc", b"x" * 3_000_000])
def test_hashes_are_sha256sums(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    expected = {
        b"": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        b"abc": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }.get(content, hashlib.sha256(content).hexdigest())
    assert sha256_file(tmp_path / "file") == sha256_file(str(tmp_path / "file")) == expected


class TestReading:
    @pytest.mark.parametrize("text", ['{"r": 8, "r": 16}', '{"a": [{"b": {"r": 1, "x": 2, "r": 1}}]}'])
    def test_an_object_that_repeats_a_key_is_refused(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "adapter_config.json"
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r'not valid JSON: an object repeats the key "r"'):
            read_json_object(path)
        path.write_text('{"a": {"r": 1}, "b": {"r": 2}, "r": Infinity}')
        assert read_json_object(path)["b"] == {"r": 2}
