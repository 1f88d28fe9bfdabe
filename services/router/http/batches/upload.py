"""An uploaded file out of a multipart/form-data body, as it comes. Pure but for the file that it writes.

The body is never held whole: what belongs to the file is written on, the few other fields are small, and the parser bounds headers.
"""

from __future__ import annotations

from typing import BinaryIO

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from headrace.errors import InvalidRequestError

FIELD_BYTES_MAX = 1024
FIELDS_MAX = 16


def boundary_of(content_type: str) -> bytes:
    """The boundary that a content-type names.

    Raises:
        InvalidRequestError: It is no multipart/form-data.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 256:
        message = f"content-type must be multipart/form-data with a boundary; got {content_type[:60]!r}"
        raise InvalidRequestError(message, param="content-type")
    return boundary


class Upload:
    """The parts of one body. Everything is checked as it comes; `finish` says whether it was all there."""

    def __init__(self, boundary: bytes, sink: BinaryIO) -> None:
        """`sink` takes the file's content."""
        self.fields: dict[str, str] = {}
        self.filename = ""
        self.num_bytes = 0
        self._sink = sink
        self._parts: set[str] = set()
        self._name = ""
        self._is_file = False
        self._header_name = b""
        self._header_value = b""
        self._disposition = ""
        self._value = b""
        self._is_over = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_part_data": self._take_data,
                "on_part_end": self._end_part,
                "on_header_field": self._take_header_name,
                "on_header_value": self._take_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_end": self._end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        """Take more of the body.

        Raises:
            InvalidRequestError: It is not of the form that its content-type says, or holds what it must not.
        """
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise InvalidRequestError(f"the body is not valid multipart/form-data: {error}") from error

    def finish(self) -> None:
        """The body is over.

        Raises:
            InvalidRequestError: Something is missing.
        """
        if not self._is_over:
            raise InvalidRequestError("the body ends within a part: the last boundary is missing")
        if "file" not in self._parts:
            raise InvalidRequestError("file is required", param="file")

    def _begin_part(self) -> None:
        self._name, self._value, self._disposition, self._is_file = "", b"", "", False

    def _take_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _take_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value.decode("utf-8", errors="replace")
        self._header_name = self._header_value = b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", errors="replace")
        if not self._name or self._name in self._parts or len(self._parts) >= FIELDS_MAX:
            raise InvalidRequestError(
                f"the body must have at most {FIELDS_MAX} parts, each with a name of its own; got {self._name[:60]!r}"
            )
        self._parts.add(self._name)
        if self._name == "file":
            if b"filename" not in options:
                raise InvalidRequestError("file must be a part with a filename", param="file")
            self._is_file = True
            # Only the last part of a path, so that it is a name wherever it is shown.
            self.filename = options[b"filename"].decode("utf-8", errors="replace").replace("\\", "/").rpartition("/")[2][:255]

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._sink.write(data[start:end])
            self.num_bytes += end - start
            return
        self._value += data[start:end]
        if len(self._value) > FIELD_BYTES_MAX:
            raise InvalidRequestError(f"{self._name[:60]} must be at most {FIELD_BYTES_MAX} bytes", param=self._name[:60])

    def _end_part(self) -> None:
        if not self._is_file:
            self.fields[self._name] = self._value.decode("utf-8", errors="replace")

    def _end(self) -> None:
        self._is_over = True
