"""What a call may raise, split by what the caller can do."""

from __future__ import annotations

from typing import Any

import grpc

REQUEST_ID_KEY = "x-request-id"
_CODE_KEY = "headrace-error-code"
_TOO_LARGE = "larger than max"
"""In what gRPC itself says of a message over its size limit."""
_PARAM_KEY = "headrace-error-param"
_RETRY_KEY = "headrace-retry-after-ms"


class HeadraceError(Exception):
    """Root of the tree.

    Attributes:
        code: The server's stable code, for example "invalid_request"; gRPC's status where the server did not answer.
        param: The request field it is about; empty where there is none.
        request_id: The request's id in the server's logs and traces; empty where it never got one.
        retry_after_s: Seconds after which a retry makes sense; None where the server did not say.
    """

    def __init__(
        self, message: str, *, code: str = "", param: str = "", request_id: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class InvalidRequestError(HeadraceError):
    """The request can never succeed as sent."""


class NotFoundError(InvalidRequestError):
    """It names a model that is not served."""


class UnauthenticatedError(HeadraceError):
    """The server asks for a key, or for another one."""


class OverloadedError(HeadraceError):
    """Too much is open; come back after `retry_after_s`."""


class DeadlineExceededError(HeadraceError):
    """The call's deadline passed."""


class CancelledError(HeadraceError):
    """The call was cancelled, here or by an operator."""


class UnavailableError(HeadraceError):
    """The server, or a stage of it, cannot be reached."""


class RequestFailedError(HeadraceError):
    """This request only failed."""


_CLASSES: dict[grpc.StatusCode, type[HeadraceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidRequestError,
    grpc.StatusCode.UNIMPLEMENTED: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: UnauthenticatedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
}


def error_of(failure: Any, request_id: str) -> HeadraceError:
    """The error of a call that gRPC ended.

    Args:
        failure: A grpc.RpcError, whose methods its type does not tell.
        request_id: As far as it is known without the failure, which may name it.
    """
    status: grpc.StatusCode = failure.code()
    metadata = {str(key): value for key, value in failure.trailing_metadata() or () if isinstance(value, str)}
    kind = _CLASSES.get(status, RequestFailedError)
    code = metadata.get(_CODE_KEY, "")
    # A message over its size limit has the same status as a full queue, and no retry helps it.
    if kind is OverloadedError and (code == "request_too_large" or _TOO_LARGE in (failure.details() or "")):
        kind = InvalidRequestError
    retry_ms = metadata.get(_RETRY_KEY)
    return kind(
        failure.details() or status.name,
        code=code or status.name.lower(),
        param=metadata.get(_PARAM_KEY, ""),
        request_id=metadata.get(REQUEST_ID_KEY, request_id),
        retry_after_s=int(retry_ms) / 1000 if retry_ms is not None else None,
    )
