"""Steps of a set-up: each done once, within a time limit, its output kept in a log file.

A step is done when its stamp holds the fingerprint of what it does and all that it makes is there. So a second set-up takes a
second, a changed version or command is done again, and one that was cut off starts where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headrace.supervision.process_table import descendants, kill_entry, read_table

_LOG_LINES_SHOWN = 15


class StepError(RuntimeError):
    """A step failed or took too long; the message names it, the reason and the log."""


@dataclass(frozen=True)
class Step:
    """One step: commands run in order, then a function."""

    name: str
    """`<peer>: <what>`; unique."""
    limit_s: float
    """For all of it, seconds."""
    commands: Sequence[Sequence[str]] = ()
    action: Callable[[], None] | None = None
    makes: Sequence[Path] = ()
    """What is there afterwards."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of the commands."""
    directory: Path | None = None
    """Where the commands run, made if it is missing; `None`: where the set-up runs."""

    @property
    def fingerprint(self) -> str:
        """A hash of what the step does: other commands, another product, another fingerprint."""
        parts = [self.name, *(argument for command in self.commands for argument in command), *map(str, self.makes)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def file_name(self) -> str:
        """The name as a file's."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)


def is_done(step: Step, stamps: Path) -> bool:
    """Whether the step was done as it stands, and what it made is still there."""
    stamp = stamps / step.file_name
    return stamp.is_file() and stamp.read_text() == step.fingerprint and all(path.exists() for path in step.makes)


def run_steps(steps: Sequence[Step], *, stamps: Path, logs: Path, say: Callable[[str], None]) -> None:
    """Do all that is not done yet, in order.

    Raises:
        StepError: One failed; those before it stay done.
    """
    stamps.mkdir(parents=True, exist_ok=True)
    logs.mkdir(parents=True, exist_ok=True)
    for step in steps:
        if is_done(step, stamps):
            say(f"{step.name}: done before")
            continue
        say(f"{step.name} ... (at most {step.limit_s / 60:.0f} min)")
        begin_s = time.monotonic()
        _run(step, logs / f"{step.file_name}.log")
        (stamps / step.file_name).write_text(step.fingerprint)
        say(f"{step.name}: done in {time.monotonic() - begin_s:.0f} s")


def _run(step: Step, log_path: Path) -> None:
    deadline_s = time.monotonic() + step.limit_s
    log_path.unlink(missing_ok=True)
    if step.directory is not None:
        step.directory.mkdir(parents=True, exist_ok=True)
    for command in step.commands:
        _run_command(step, command, log_path, deadline_s)
    if step.action is not None:
        try:
            step.action()
        except OSError as error:
            raise StepError(f"{step.name}: {error}") from error
    if missing := [str(path) for path in step.makes if not path.exists()]:
        raise StepError(f"{step.name}: ended well and did not make {', '.join(missing)}; see {log_path}")


def _run_command(step: Step, command: Sequence[str], log_path: Path, deadline_s: float) -> None:
    with log_path.open("ab") as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **step.env}, cwd=step.directory,
                start_new_session=True,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise StepError(f"{step.name}: {command[0]} is not installed") from error
        try:
            status = process.wait(timeout=max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise StepError(
                f"{step.name}: not done within {step.limit_s:.0f} s: stopped. Its log, {log_path}, ends:\n{tail(log_path)}"
            ) from None
        finally:
            if process.poll() is None:
                _kill_all(process)
    if status:
        raise StepError(f"{step.name}: {command[0]} ended with status {status}. Its log, {log_path}, ends:\n{tail(log_path)}")


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    table = read_table()
    for pid in descendants(table, {process.pid}):
        kill_entry(table[pid])
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(path: Path, num_lines: int = _LOG_LINES_SHOWN) -> str:
    """The last lines of a log, indented."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:]
    return "\n".join(f"    {line}" for line in lines)
