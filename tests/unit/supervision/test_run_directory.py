from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from headrace.errors import ConfigError
from headrace.supervision.run_directory import PID_FILE_NAME, RunDirectory, remove_run_directory_of


def test_it_is_made_private_and_signed_and_removed_with_all_in_it(tmp_path):
    path = tmp_path / "deep" / "run"
    with RunDirectory.claim(path) as claimed:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert (path / PID_FILE_NAME).read_text().split()[0] == str(os.getpid())
        (path / "sub").mkdir()
        (path / "sub" / "x.ipc").touch()
        claimed.remove()
        assert not path.exists()
    assert (tmp_path / "deep").exists()


def test_a_live_owner_keeps_others_out_and_is_named(tmp_path):
    with (
        RunDirectory.claim(tmp_path / "run"),
        pytest.raises(ConfigError, match=rf"in use by a live supervisor \(process {os.getpid()}\)") as caught,
    ):
        RunDirectory.claim(tmp_path / "run")
    assert caught.value.param == "run_directory"


def test_what_a_dead_owner_left_is_cleared(tmp_path):
    path = tmp_path / "run"
    (path / "sub").mkdir(parents=True)
    (path / "link").symlink_to(tmp_path)
    (path / PID_FILE_NAME).write_text("4194305 1\n")
    path.chmod(0o755)
    with RunDirectory.claim(path):
        assert os.listdir(path) == [PID_FILE_NAME]
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert tmp_path.exists()


def test_a_directory_with_files_of_others_is_never_emptied(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="is not empty and no supervisor made it"):
        RunDirectory.claim(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_directory_is_refused(tmp_path, kind):
    path = tmp_path / "run"
    path.touch() if kind == "file" else path.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match=f"run directory {path} cannot be used"):
        RunDirectory.claim(path)


def test_the_guard_removes_only_what_its_own_supervisor_left(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / PID_FILE_NAME).write_text("4194305 1\n")
    remove_run_directory_of(str(path), 4194306)
    assert path.exists()
    remove_run_directory_of(str(path), 4194305)
    assert not path.exists()
    remove_run_directory_of(str(path), 4194305)
    with RunDirectory.claim(path):
        remove_run_directory_of(str(path), os.getpid())
        assert path.exists(), "its owner lives"


def test_a_full_disk_is_told_and_lets_go_of_the_directory(tmp_path, monkeypatch):
    def refuse(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", refuse)
        with pytest.raises(ConfigError, match=f"run directory {tmp_path / 'run'} cannot be used: No space left on device"):
            RunDirectory.claim(tmp_path / "run")
    with RunDirectory.claim(tmp_path / "run"):
        assert os.listdir(tmp_path / "run") == [PID_FILE_NAME]
