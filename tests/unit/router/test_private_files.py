"""Goal: nobody but the router's user reads what clients left. Method: modes of all that is there, under a umask of 022."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.router.http.batches.storage import DATABASE, FileLimits, Storage
from services.router.http.responses.entries import Entries, HistoryLimits

FILES = FileLimits(max_files=10, max_total_bytes=1 << 20, max_batches=10)
HISTORY = HistoryLimits(max_entries=10, max_bytes=1 << 20, ttl_s=100.0)
BODY = {"id": "resp-1", "output": []}


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    former = os.umask(0o022)
    yield
    os.umask(former)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def modes(directory: Path) -> dict[str, int]:
    return {path.name: mode(path) for path in directory.iterdir()}


def open_all(directory: Path) -> tuple[Storage, Entries]:
    storage, entries = Storage(directory, FILES), Entries(str(directory / "history.sqlite"), HISTORY)
    entries.put(BODY, "response", [], key_name="", status="completed", now_s=1.0)
    return storage, entries


NAMES = {name + end for name in (DATABASE, "history.sqlite") for end in ("", "-wal", "-shm")} | {"files"}


def test_what_is_made_is_private(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    storage, entries = open_all(directory)
    found = modes(directory)
    assert set(found) == NAMES
    assert found.pop("files") == 0o700
    assert set(found.values()) == {0o600}
    assert mode(directory) == 0o700
    storage.close()
    entries.close()


def test_what_an_earlier_version_made_is_made_private_and_the_operators_directory_is_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    storage, entries = open_all(tmp_path)
    for path in tmp_path.iterdir():
        path.chmod(0o755 if path.is_dir() else 0o644)
    # As after a kill: the logs are still there.
    again = open_all(tmp_path)
    found = modes(tmp_path)
    assert set(found) == NAMES
    assert {name for name, bits in found.items() if bits & 0o077} == set()
    assert mode(tmp_path) == 0o755
    for store in (storage, entries, *again):
        store.close()


def test_a_history_in_memory_makes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Entries(":memory:", HISTORY).close()
    assert list(tmp_path.iterdir()) == []
