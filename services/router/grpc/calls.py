"""One client call over gRPC: deadline and trace from its metadata, errors to statuses, its end counted once. Part of the shell."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from headrace.errors import HeadraceError, RequestFailedError
from headrace.telemetry import logs
from services.router.generation import Call, Engine
from services.router.grpc import conversions
from services.router.tenants import tenant_of

log = logs.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]


@asynccontextmanager
async def client_call(
    engine: Engine, endpoint: str, context: Context, *, is_streaming: bool = False, sends_head: bool = True
) -> AsyncIterator[Call]:
    """Open a call, and close it whatever happens.

    grpc.aio cancels the handler's task when the client cancels or its deadline passes.

    Args:
        engine: Counts and traces the call.
        endpoint: `package.Service/Method`.
        context: Of the handler.
        is_streaming: Whether the answer comes in pieces.
        sends_head: Send the response's head at once, with the request's id in it.
    """
    metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    call = engine.begin_call(
        protocol="grpc",
        endpoint=endpoint,
        traceparent=metadata.get("traceparent", ""),
        tracestate=metadata.get("tracestate", ""),
    )
    call.is_streaming = is_streaming
    call.timeout_s = _timeout_s(context)
    call.cut = _canceller()
    call.tenant = tenant_of(None, metadata.get("authorization", ""))
    status, failure = "OK", None
    try:
        if sends_head:
            await context.send_initial_metadata(((conversions.REQUEST_ID_KEY, call.request_id),))
        yield call
    except HeadraceError as error:
        failure = error
    except (asyncio.CancelledError, GeneratorExit):
        status = grpc.StatusCode.CANCELLED.name
        raise
    except Exception:
        log.exception("rpc.failed", endpoint=endpoint)
        failure = RequestFailedError("internal error; the router's log has the details")
    finally:
        if failure is not None:
            status = conversions.status_of(failure).name
        engine.end_call(call, status=status, error_code=None if failure is None else failure.code)
    if failure is not None:
        # An asyncio client that gets head and trailers in one go may see no head (grpcio 1.85): the trailers name the request too.
        trailers = ((conversions.REQUEST_ID_KEY, call.request_id), *conversions.metadata_of(failure))
        await context.abort(conversions.status_of(failure), failure.message, trailers)


def _timeout_s(context: Context) -> float | None:
    remaining_s: float | None = context.time_remaining()
    return None if remaining_s is None else max(remaining_s, 0.001)


def _canceller() -> Callable[[], object] | None:
    task = asyncio.current_task()
    return None if task is None else task.cancel
