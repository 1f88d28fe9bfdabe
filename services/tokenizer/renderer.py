"""Renders chat templates in a process of its own, which is killed when it takes too long.

A template is a program, and the text it works on comes from clients. Inside one process nothing ends every loop and every long
single operation for certain (an exception waits for the next bytecode, a signal for the main thread), so a renderer is a child
that gets a conversation over a pipe, with an address-space limit, and SIGKILL at the deadline. Its start costs a fraction of a
second, once; a conversation costs one exchange over the pipe.

This file is part of the shell: `Renderer` is the parent's side, used by one thread, and `main` the child's.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final

from headrace.errors import HeadraceError, ModelError, RequestFailedError, error_from_code
from headrace.supervision.child import set_parent_death_signal
from services.tokenizer.templates import ChatTemplate, Message

_START_TIMEOUT_S: Final = 30.0
_LENGTH: Final = struct.Struct("<I")
_READ_BYTES: Final = 1 << 16
# What JSON adds to a text at most: six bytes for a control character.
_ESCAPE_BYTES_MAX: Final = 6


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """Bounds of one rendering."""

    timeout_s: float
    memory_bytes: int
    output_max: int
    """Most characters of a rendered prompt."""


class _Late(Exception):
    """The child did not answer in time."""


class _Gone(Exception):
    """The child ended instead of answering."""


class Renderer:
    """One child that renders one model's template. Not for use by two threads at once."""

    def __init__(self, template: str, *, special_tokens: Mapping[str, str], model: str, limits: RenderLimits) -> None:
        self._setup = {
            "template": template,
            "special_tokens": dict(special_tokens),
            "model": model,
            "output_max": limits.output_max,
            "memory_bytes": limits.memory_bytes,
        }
        self._model = model
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is one."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the child and have it compile the template.

        Raises:
            ModelError: The template cannot be compiled, or not in time.
        """
        self.close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "services.tokenizer.renderer", str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
        try:
            reply = self._exchange(self._setup, _START_TIMEOUT_S)
        except (_Late, _Gone) as error:
            status = self._kill()
            raise ModelError(
                f"model {self._model}: its chat template could not be compiled in {_START_TIMEOUT_S} s "
                f"(the renderer ended with status {status})"
            ) from error
        if "code" in reply:
            self._kill()
            raise _error(reply)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, continue_final_message: bool) -> str:
        """Render a conversation; arguments and errors are those of `ChatTemplate.render`.

        Raises:
            InvalidRequestError: The conversation does not fit the template.
            RequestFailedError: The template failed, took too long, or took too much memory.
        """
        if self._process is None or self._process.poll() is not None:
            self.start()
        request = {
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        try:
            reply = self._exchange(request, self._limits.timeout_s)
        except _Late as error:
            self._kill()
            raise RequestFailedError(
                f"messages: rendering the chat template of {self._model} took longer than {self._limits.timeout_s} s and was "
                "stopped; shorten the conversation, or raise tokenizer.render_timeout_s",
                param="messages",
            ) from error
        except _Gone as error:
            status = self._kill()
            raise RequestFailedError(
                f"messages: the process rendering the chat template of {self._model} ended with status {status}; "
                f"its memory limit is {self._limits.memory_bytes} bytes (tokenizer.render_memory_bytes)",
                param="messages",
            ) from error
        if "code" in reply:
            raise _error(reply)
        text: str = reply["text"]
        return text

    def interrupt(self) -> None:
        """Kill the child from another thread: a rendering under way fails at once. `close` must follow."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the child, if there is one."""
        if self._process is not None:
            self._kill()

    def _kill(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        status = process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        return status

    def _exchange(self, message: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a message and read the answer, both before the deadline."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + timeout_s
        unsent = memoryview(_frame(message))
        received = bytearray()
        while len(received) < _LENGTH.size or len(received) < _LENGTH.size + _LENGTH.unpack_from(received)[0]:
            poll = select.poll()
            poll.register(process.stdout, select.POLLIN)
            if unsent:
                poll.register(process.stdin, select.POLLOUT)
            remaining_s = deadline - time.monotonic()
            # Rounded up, or the last millisecond would be spent in a busy loop.
            if remaining_s <= 0 or not poll.poll(int(remaining_s * 1000) + 1):
                raise _Late
            if unsent:
                unsent = unsent[_write(process.stdin, unsent) :]
            self._receive(process.stdout, received)
        return dict(json.loads(received[_LENGTH.size :]))

    def _receive(self, stream: IO[bytes], received: bytearray) -> None:
        try:
            data = os.read(stream.fileno(), _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            raise _Gone
        received += data
        if len(received) > self._limits.output_max * _ESCAPE_BYTES_MAX + _READ_BYTES:
            raise _Gone


def _write(stream: IO[bytes], data: memoryview) -> int:
    try:
        return os.write(stream.fileno(), data)
    except BlockingIOError:
        return 0
    except BrokenPipeError as error:
        raise _Gone from error


def _frame(message: Mapping[str, Any]) -> bytes:
    payload = json.dumps(message, ensure_ascii=False).encode()
    return _LENGTH.pack(len(payload)) + payload


def _error(reply: Mapping[str, Any]) -> HeadraceError:
    return error_from_code(reply["code"], reply["message"], param=reply["param"])


def main() -> None:
    """Be the child: compile the template of the first message, then render until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        return
    setup = _read(sys.stdin.buffer)
    if setup is None:
        return
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    try:
        template = ChatTemplate(
            setup["template"],
            special_tokens=setup["special_tokens"],
            model=setup["model"],
            output_max=setup["output_max"],
            strftime=time.strftime,
        )
    except HeadraceError as error:
        _reply(_error_fields(error))
        return
    _reply({})
    while (request := _read(sys.stdin.buffer)) is not None:
        try:
            _reply({"text": template.render(**request)})
        except HeadraceError as error:
            _reply(_error_fields(error))


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


if __name__ == "__main__":
    main()
