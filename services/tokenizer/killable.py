"""A child process that answers questions over a pipe and is killed when one takes too long. Part of the shell.

For work that may loop for ever or take all memory, on input that comes from clients: nothing inside a process ends every loop and
every long operation for certain. The child gets an address-space limit, the parent sends SIGKILL at the deadline, and the child's
parent-death signal and its pipe end it with the parent. One exchange is under way at a time; messages are JSON objects.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Final

from headrace.errors import HeadraceError, error_from_code
from headrace.supervision.child import set_parent_death_signal

_LENGTH: Final = struct.Struct("<I")
_READ_BYTES: Final = 1 << 16
# Of /proc/<pid>/stat after the name: ticks in user mode and in the kernel.
_CPU_FIELDS: Final = slice(11, 13)

Answer = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Answers one question; a HeadraceError that it raises is raised in the parent."""


class LateError(Exception):
    """The child did not answer in time."""


class GoneError(Exception):
    """The child ended instead of answering."""


class KillableChild:
    """The parent's side. Not for use by two threads at once, `interrupt` aside.

    Args:
        module: What the child runs; it calls `serve`.
        answer_bytes_max: Longest answer that is read.
    """

    def __init__(self, module: str, *, answer_bytes_max: int) -> None:
        self._module = module
        self._answer_bytes_max = answer_bytes_max
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is one."""
        return self._process.pid if self._process is not None else None

    @property
    def is_running(self) -> bool:
        """Whether there is a child to ask."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start a child; its first question is what sets it up."""
        self.kill()
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)

    @property
    def cpu_s(self) -> float:
        """Processor time that the child has had, seconds; 0 where there is none, or the kernel does not say."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return sum(map(int, fields[_CPU_FIELDS])) / os.sysconf("SC_CLK_TCK")

    def ask(self, question: Mapping[str, Any], timeout_s: float, *, goes_on: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Send a question and read the answer, both before the deadline.

        Args:
            question: What the child is to answer.
            timeout_s: Time for both.
            goes_on: Asked each time that has passed, whether to wait as long again.

        Raises:
            LateError: There was no answer in time; the child must be killed.
            GoneError: The child has ended, or answers more than is read.
            HeadraceError: What answering raised.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + timeout_s
        unsent = memoryview(_frame(question))
        received = bytearray()
        while len(received) < _LENGTH.size or len(received) < _LENGTH.size + _LENGTH.unpack_from(received)[0]:
            poll = select.poll()
            poll.register(process.stdout, select.POLLIN)
            if unsent:
                poll.register(process.stdin, select.POLLOUT)
            remaining_s = deadline - time.monotonic()
            # Rounded up, or the last millisecond would be spent in a busy loop.
            if remaining_s <= 0 or not poll.poll(int(remaining_s * 1000) + 1):
                if not goes_on():
                    raise LateError
                deadline = time.monotonic() + timeout_s
                continue
            if unsent:
                unsent = unsent[_write(process.stdin, unsent) :]
            self._receive(process.stdout, received)
        answer = dict(json.loads(received[_LENGTH.size :]))
        if "code" in answer:
            raise error_from_code(answer["code"], answer["message"], param=answer["param"])
        return answer

    def interrupt(self) -> None:
        """Kill the child from another thread: a question under way fails at once. `kill` must follow."""
        process = self._process
        if process is not None:
            process.kill()

    def kill(self) -> int | None:
        """End the child, if there is one; gives its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        status = process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        return status

    def _receive(self, stream: IO[bytes], received: bytearray) -> None:
        try:
            data = os.read(stream.fileno(), _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            raise GoneError
        received += data
        if len(received) > self._answer_bytes_max + _READ_BYTES:
            raise GoneError


def serve(begin: Callable[[Mapping[str, Any]], Answer]) -> None:
    """Be the child: set up with the first question, whose `memory_bytes` is the limit; answer until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        return
    setup = _read(sys.stdin.buffer)
    if setup is None:
        return
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    try:
        answer = begin(setup)
    except HeadraceError as error:
        _reply(_error_fields(error))
        return
    _reply({})
    while (question := _read(sys.stdin.buffer)) is not None:
        try:
            _reply(answer(question))
        except HeadraceError as error:
            _reply(_error_fields(error))


def _write(stream: IO[bytes], data: memoryview) -> int:
    try:
        return os.write(stream.fileno(), data)
    except BlockingIOError:
        return 0
    except BrokenPipeError as error:
        raise GoneError from error


def _frame(message: Mapping[str, Any]) -> bytes:
    payload = json.dumps(message, ensure_ascii=False).encode()
    return _LENGTH.pack(len(payload)) + payload


def _error_fields(error: HeadraceError) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "param": error.param}


def _read(stream: IO[bytes]) -> dict[str, Any] | None:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    return dict(json.loads(stream.read(_LENGTH.unpack(head)[0])))


def _reply(message: Mapping[str, Any]) -> None:
    sys.stdout.buffer.write(_frame(message))
    sys.stdout.buffer.flush()
