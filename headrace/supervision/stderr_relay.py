"""Children's stderr on its way to ours, and our own: kept as a bounded tail, passed on by a thread, never in anyone's way.

The event loop only moves bytes into a bounded queue. Writing may block for as long as nobody reads our stderr; then the
queue fills and further output is dropped and counted, so that neither the child nor the supervisor ever waits for a reader.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from typing import IO

from headrace.telemetry.standard_streams import write_or_lose

QUEUE_SIZE_MAX_BYTES = 1024 * 1024
TAIL_SIZE_MAX_BYTES = 32 * 1024
LINE_SIZE_MAX_BYTES = 4 * 1024
_READ_SIZE_BYTES = 64 * 1024
_NUM_READS_AT_EXIT_MAX = 64


class StderrRelay:
    """The one writer to this process's stderr, for all its children and for itself."""

    def __init__(self, fd: int = 2) -> None:
        self._fd = fd
        self._queue: deque[bytes] = deque()
        self._queue_bytes = 0
        self._dropped_bytes = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write_all, name="stderr-relay", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Queue whole lines; drops them, counted, when the queue is full. Once closed it writes at once."""
        with self._changed:
            if self._is_closed:
                # Where the thread is still at it, it hangs, and so would this.
                if not self._thread.is_alive():
                    write_or_lose(self._fd, data)
                return
            if self._queue_bytes + len(data) > QUEUE_SIZE_MAX_BYTES:
                self._dropped_bytes += len(data)
                return
            if self._dropped_bytes:
                note = f"headrace: {self._dropped_bytes} bytes of stderr were dropped, as nobody read them in time\n".encode()
                self._queue.append(note)
                self._queue_bytes += len(note)
                self._dropped_bytes = 0
            self._queue.append(data)
            self._queue_bytes += len(data)
            self._changed.notify()

    def close(self, timeout_s: float = 1.0) -> None:
        """Write what is queued, for at most `timeout_s`; the rest is lost with the process."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._is_closed:
                    self._changed.wait()
                if not self._queue:
                    return
                data = self._queue.popleft()
            # Should our stderr be closed for good or gone with a terminal, the tail still keeps the last lines.
            write_or_lose(self._fd, data)
            with self._changed:
                self._queue_bytes -= len(data)


class StderrTail:
    """Cuts one child's stderr into lines: whole ones out to the relay, the last ones kept."""

    def __init__(self, num_lines_max: int) -> None:
        self._lines: deque[bytes] = deque()
        self._num_lines_max = num_lines_max
        self._size_bytes = 0
        self._partial = b""

    def feed(self, data: bytes) -> bytes:
        """Take what was read; returns what may be passed on now, ending with a whole line unless a line is too long."""
        head, newline, self._partial = (self._partial + data).rpartition(b"\n")
        passed = head + newline
        # Of a flood only the end is split into lines: what would not be kept costs nothing.
        if newline:
            self._keep(head[-TAIL_SIZE_MAX_BYTES:].split(b"\n")[-self._num_lines_max :])
        if len(self._partial) > LINE_SIZE_MAX_BYTES:
            passed += self._partial
            self._keep([self._partial])
            self._partial = b""
        return passed

    def flush(self) -> bytes:
        """The child has ended: keep and return an unfinished last line, made whole."""
        if not self._partial:
            return b""
        rest, self._partial = self._partial, b""
        self._keep([rest])
        return rest + b"\n"

    @property
    def lines(self) -> list[str]:
        """The last lines, oldest first."""
        kept = [*self._lines, self._partial] if self._partial else list(self._lines)
        return [line.decode("utf-8", "replace").rstrip("\r") for line in kept]

    def _keep(self, lines: list[bytes]) -> None:
        for line in lines:
            kept = line[:LINE_SIZE_MAX_BYTES]
            self._lines.append(kept)
            self._size_bytes += len(kept)
        while len(self._lines) > self._num_lines_max or self._size_bytes > TAIL_SIZE_MAX_BYTES:
            self._size_bytes -= len(self._lines.popleft())


class StderrReader:
    """Reads one child's stderr in the event loop, into its tail and the relay."""

    def __init__(self, pipe: IO[bytes], *, relay: StderrRelay, num_lines_max: int) -> None:
        self._pipe = pipe
        self._relay = relay
        self._tail = StderrTail(num_lines_max)
        self._loop = asyncio.get_running_loop()
        os.set_blocking(pipe.fileno(), False)
        self._loop.add_reader(pipe.fileno(), self._read)

    @property
    def lines(self) -> list[str]:
        """The last lines, oldest first."""
        return self._tail.lines

    def read_rest(self) -> None:
        """Read what the pipe holds now. Not to its end: a grandchild may hold it open, and even flood it."""
        for _ in range(_NUM_READS_AT_EXIT_MAX):
            if not self._read():
                return

    def close(self) -> None:
        """Stop reading. A second call does nothing."""
        if self._pipe.closed:
            return
        self._loop.remove_reader(self._pipe.fileno())
        self._pipe.close()
        if rest := self._tail.flush():
            self._relay.write(rest)

    def _read(self) -> bool:
        """Read once; True when there may be more now."""
        if self._pipe.closed:
            return False
        try:
            data = os.read(self._pipe.fileno(), _READ_SIZE_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self.close()
            return False
        if passed := self._tail.feed(data):
            self._relay.write(passed)
        return True
