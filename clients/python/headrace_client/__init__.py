"""Client of Headrace over gRPC: `Client` and, for asyncio, `AsyncClient`."""

from headrace_client.aio import AsyncClient, AsyncStream
from headrace_client.client import Client, Stream
from headrace_client.errors import (
    CancelledError,
    DeadlineExceededError,
    HeadraceError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    RequestFailedError,
    UnauthenticatedError,
    UnavailableError,
)
from headrace_client.options import Retries
from headrace_client.types import Message, Model, Piece, Reply, Usage, assistant, system, user

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "CancelledError",
    "Client",
    "DeadlineExceededError",
    "HeadraceError",
    "InvalidRequestError",
    "Message",
    "Model",
    "NotFoundError",
    "OverloadedError",
    "Piece",
    "Reply",
    "RequestFailedError",
    "Retries",
    "Stream",
    "UnauthenticatedError",
    "UnavailableError",
    "Usage",
    "assistant",
    "system",
    "user",
]
