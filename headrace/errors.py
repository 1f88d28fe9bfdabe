"""One error tree for all services.

    HeadraceError
    ├── InvalidRequestError      the caller must change the request (4xx)
    │   ├── ContextLengthError   does not fit the model's context (400)
    │   ├── NotFoundError        names something that does not exist (404)
    │   └── RequestTooLargeError the body is over its limit (413)
    ├── UnauthenticatedError     the caller must send a key that is taken (401)
    ├── OverloadedError          try again after `retry_after_s` (429 or 503)
    ├── DeadlineExceededError    the request's own deadline passed (408)
    ├── RequestAbortedError      the client went away or asked to stop (499)
    ├── RequestFailedError       this request only failed (500)
    ├── UnavailableError         no instance of a stage can serve now (503)
    ├── ReplicaDeadError         the peer's process life is over; try another
    ├── ProtocolError            a peer sent what the contract forbids
    ├── ConfigError              a setting stops the start
    └── ModelError               a model directory cannot be used

The split is by what the caller can do. `code` is stable: it is the wire's string, the metric label `error_type`, the span
attribute `error.type` and the `code` of an HTTP error body. `param` names the offending field, where there is one.
"""

from __future__ import annotations

from typing import ClassVar


class HeadraceError(Exception):
    """Root of the tree: a message for people, a code for programs."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(HeadraceError):
    """The request can never succeed as sent; the message names the field, the limit and the value."""

    code = "invalid_request"
    http_status = 400


class ContextLengthError(InvalidRequestError):
    """The prompt, or the prompt with the answer asked for, is too long here. The code is OpenAI's: agents shorten on it."""

    code = "context_length_exceeded"


class NotFoundError(InvalidRequestError):
    """The request names a model, path or request that does not exist."""

    code = "not_found"
    http_status = 404


class RequestTooLargeError(InvalidRequestError):
    """The body or message is over its size limit."""

    code = "request_too_large"
    http_status = 413


class UnauthenticatedError(HeadraceError):
    """The client sent no key, or one that is not taken here."""

    code = "unauthenticated"
    http_status = 401


class OverloadedError(HeadraceError):
    """A bounded queue is full. Nothing was started; the caller may retry after `retry_after_s`."""

    code = "overloaded"
    http_status = 429

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class DeadlineExceededError(HeadraceError):
    """The request's absolute deadline passed before it was finished."""

    code = "deadline_exceeded"
    http_status = 408


class RequestAbortedError(HeadraceError):
    """The client disconnected, cancelled, or an abort call named the request."""

    code = "aborted"
    http_status = 499


class RequestFailedError(HeadraceError):
    """This request failed for a reason that does not touch any other."""

    code = "request_failed"
    http_status = 500


class UnavailableError(HeadraceError):
    """No instance of a needed stage is there; the message names the stage."""

    code = "unavailable"
    http_status = 503

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class ReplicaDeadError(HeadraceError):
    """The peer's incarnation is over. Its work must be sent elsewhere."""

    code = "replica_dead"
    http_status = 503


class ProtocolError(HeadraceError):
    """A peer broke the contract: a truncated frame, a missing field, a wrong version."""

    code = "protocol_error"
    http_status = 500


class ConfigError(HeadraceError):
    """A setting is unknown, out of range or impossible here. Stops the start with exit status 2."""

    code = "config_error"


class ModelError(HeadraceError):
    """A model directory, weight file or tokenizer is missing, corrupt or unsupported. Stops the start."""

    code = "model_error"


def _tree(root: type[HeadraceError]) -> dict[str, type[HeadraceError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


ERROR_CLASSES: dict[str, type[HeadraceError]] = _tree(HeadraceError)


def error_from_code(code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> HeadraceError:
    """Rebuild an error that crossed the wire; an unknown code becomes a `RequestFailedError` that keeps the text."""
    error_class = ERROR_CLASSES.get(code)
    if error_class is None:
        return RequestFailedError(f"{code}: {message}", param=param)
    error = error_class(message, param=param)
    if retry_after_s is not None and isinstance(error, (OverloadedError, UnavailableError)):
        error.retry_after_s = retry_after_s
    return error
