"""A server-sent-events parser: bytes in, in pieces of any size; whole events out.

Pure: it knows no socket and no clock. It follows the event stream grammar of the WHATWG HTML standard: lines end in LF, CR LF or
CR, a line that starts with a colon is a comment, a blank line ends the event, an event without data is dropped, and what is left
at the end of the stream without a blank line is no event.
"""

from __future__ import annotations

from dataclasses import dataclass

EVENT_BYTES_MAX = 8 << 20
_BOM = b"\xef\xbb\xbf"


class SseError(ValueError):
    """The stream holds an event over the size limit."""


@dataclass(frozen=True)
class SseEvent:
    """One event: `data` is the joined data lines, `event` its type (`message` where the server names none)."""

    data: bytes
    event: str = "message"


class SseParser:
    """Incremental parser of one stream."""

    def __init__(self, *, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self._event_bytes_max = event_bytes_max
        self._pending = b""
        self._at_start = True
        # The last line ended in CR at the very end of a piece: an LF that comes next belongs to it.
        self._skip_lf = False
        self._data_lines: list[bytes] = []
        self._data_bytes = 0
        self._event = ""

    @property
    def is_inside_event(self) -> bool:
        """Whether bytes of an unfinished event are held: at the end of a stream this means that it was cut."""
        return bool(self._pending or self._data_lines or self._event)

    def feed(self, piece: bytes) -> list[SseEvent]:
        """Take the next bytes of the stream; return the events that they complete.

        Raises:
            SseError: One event is longer than `event_bytes_max`.
        """
        text = self._pending + piece
        if self._at_start:
            if len(text) < len(_BOM) and _BOM.startswith(text):
                self._pending = text
                return []
            self._at_start = False
            text = text.removeprefix(_BOM)
        if self._skip_lf and text:
            text = text.removeprefix(b"\n")
            self._skip_lf = False
        if text.endswith(b"\r"):
            self._skip_lf = True
        # bytes.splitlines splits at exactly LF, CR LF and CR.
        lines = text.splitlines(keepends=True)
        self._pending = lines.pop() if lines and not lines[-1].endswith((b"\n", b"\r")) else b""
        events = [event for line in lines if (event := self._take_line(line.rstrip(b"\r\n"))) is not None]
        if len(self._pending) + self._data_bytes > self._event_bytes_max:
            raise SseError(f"an event is longer than {self._event_bytes_max} bytes")
        return events

    def _take_line(self, line: bytes) -> SseEvent | None:
        if not line:
            return self._end_event()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data_lines.append(value)
            self._data_bytes += len(value) + 1
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        return None

    def _end_event(self) -> SseEvent | None:
        lines, event = self._data_lines, self._event
        self._data_lines, self._event, self._data_bytes = [], "", 0
        if not lines:
            return None
        return SseEvent(data=b"\n".join(lines), event=event or "message")
