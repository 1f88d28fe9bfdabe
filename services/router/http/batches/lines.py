"""Lines of a batch: what its input must be, and what is told of each. Pure but for the files that are read.

What is wrong with the body of a request is for the endpoint to say; here it is only whether it can be asked at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from headrace.errors import InvalidRequestError
from services.router.limits import check_depth, shown

ERRORS_MAX = 100
CUSTOM_ID_CHARACTERS_MAX = 512
LINE_BYTES_MAX = 16 * 1024 * 1024
_FIELDS = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True, slots=True)
class Line:
    """A request of a batch: where it stands in the file, and its name."""

    offset: int
    num_bytes: int
    custom_id: str


@dataclass(frozen=True, slots=True)
class CheckedInput:
    """What a batch's input holds; with errors, none of it is asked."""

    lines: list[Line]
    errors: list[dict[str, Any]]


def check_input(path: Path, endpoint: str, *, max_requests: int) -> CheckedInput:
    """Read a batch's input through."""
    lines: list[Line] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, offset, text in _raw_lines(path):
        if not text.strip():
            continue
        found = _check_line(text, endpoint, seen)
        if isinstance(found, str):
            seen.add(found)
            lines.append(Line(offset, len(text), found))
        else:
            errors.append({**found, "line": number})
        if len(lines) > max_requests:
            message = f"a batch must have at most {max_requests} requests (router.batch_max_requests)"
            errors.append(_error("too_many_requests", message, None, number))
        if len(errors) >= ERRORS_MAX or len(lines) > max_requests:
            break
    if not lines and not errors:
        errors.append(_error("empty_file", "the input file must have a request; it is empty", None, None))
    return CheckedInput(lines, errors)


def _raw_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    offset = 0
    with path.open("rb") as content:
        for number, text in enumerate(iter(lambda: content.readline(LINE_BYTES_MAX + 1), b""), start=1):
            yield number, offset, text
            offset += len(text)


def _check_line(text: bytes, endpoint: str, seen: set[str]) -> str | dict[str, Any]:
    """The name of a good line's request, or what is wrong with it."""
    if len(text) > LINE_BYTES_MAX:
        return _error("line_too_long", f"a line must be at most {LINE_BYTES_MAX} bytes", None, None)
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return _error("invalid_json_line", f"the line is not valid JSON: {error}", None, None)
    if not isinstance(value, dict):
        return _error("invalid_json_line", f"the line must be a JSON object; got {shown(value)}", None, None)
    unknown = sorted(value.keys() - _FIELDS)
    if unknown:
        return _error("invalid_request", f"unknown field {unknown[0]}", unknown[0], None)
    custom_id, body = value.get("custom_id"), value.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= CUSTOM_ID_CHARACTERS_MAX:
        message = f"custom_id must be a string of 1 to {CUSTOM_ID_CHARACTERS_MAX} characters; got {shown(custom_id)}"
        return _error("invalid_request", message, "custom_id", None)
    if custom_id in seen:
        return _error("duplicate_custom_id", f"custom_id {shown(custom_id)} is that of a line before", "custom_id", None)
    if value.get("method") != "POST":
        return _error("invalid_method", f"method must be POST; got {shown(value.get('method'))}", "method", None)
    if value.get("url") != endpoint:
        message = f"url must be {endpoint}, the endpoint of the batch; got {shown(value.get('url'))}"
        return _error("mismatched_endpoint", message, "url", None)
    if not isinstance(body, dict):
        return _error("invalid_request", f"body must be an object; got {shown(body)}", "body", None)
    try:
        check_depth("body", body)
    except InvalidRequestError as error:
        return _error("invalid_request", error.message, error.param, None)
    if body.get("stream"):
        return _error(
            "invalid_request", f"body.stream must be left out in a batch; got {shown(body['stream'])}", "body.stream", None
        )
    return custom_id


def _error(code: str, message: str, param: str | None, line: int | None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": param, "line": line}


def request_body(text: bytes) -> bytes:
    """The body of a checked line's request."""
    return orjson.dumps(orjson.loads(text)["body"])


def answer_line(custom_id: str, request_id: str, status: int, body: bytes) -> bytes:
    """The line of the output or error file that tells what a request was answered."""
    response = {"status_code": status, "request_id": request_id, "body": orjson.loads(body)}
    return _line(custom_id, request_id, response, None)


def unasked_line(custom_id: str, code: str, message: str) -> bytes:
    """The line of the error file for a request that was never answered."""
    return _line(custom_id, custom_id, None, {"code": code, "message": message})


def _line(custom_id: str, name: str, response: object, error: object) -> bytes:
    return orjson.dumps({"id": f"batch_req_{name}", "custom_id": custom_id, "response": response, "error": error}) + b"\n"


def told_already(path: Path) -> set[str]:
    """Names of the requests that a results file tells of; what a death left of a line is cut off."""
    found: set[str] = set()
    if not path.exists():
        return found
    end = 0
    with path.open("r+b") as content:
        for text in content:
            if not text.endswith(b"\n"):
                break
            found.add(orjson.loads(text)["custom_id"])
            end += len(text)
        content.truncate(end)
    return found
