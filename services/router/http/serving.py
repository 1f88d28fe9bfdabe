"""Generates for one exchange and sends what comes, whole or streamed, in whatever shape the protocol gives it. Part of the shell.

This is the one place that runs a generation for an HTTP client: it opens the stream, watches for the client's disconnect, and ends
a stream that fails with the protocol's own last event. A streamed answer begins with its first output, so whatever fails before
that still gets its own status.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from headrace.errors import HeadraceError
from services.router.generation import Call, Engine, GenerationRequest, OutputStream
from services.router.http.exchange import Exchange, close_on_disconnect
from services.router.http.rendering import Rendering, Usage
from services.router.tenants import tenant_of


def authorization(exchange: Exchange) -> str:
    """The client's key as an authorization header, whichever header brought it."""
    given = exchange.headers.get("authorization", "")
    key = exchange.headers.get("x-api-key", "")
    return given or (f"Bearer {key}" if key else "")


def open_stream(
    exchange: Exchange, engine: Engine, generation: GenerationRequest, *, user: str | None, is_streaming: bool
) -> OutputStream:
    """Begin a generation for the exchange's call, counted to its tenant."""
    exchange.open_call.is_streaming = is_streaming
    return open_stream_for(exchange.open_call, exchange, engine, generation, user=user)


def open_stream_for(
    call: Call, exchange: Exchange, engine: Engine, generation: GenerationRequest, *, user: str | None
) -> OutputStream:
    """The same for a call of its own, that is on the exchange's client's behalf."""
    call.is_online = exchange.tenant is None
    call.tenant = tenant_of(user, authorization(exchange)) if exchange.tenant is None else exchange.tenant
    return engine.open_stream(generation, call)


BeforeEnd = Callable[[Usage], Awaitable[None]]


async def send_answer(
    exchange: Exchange, stream: OutputStream, rendering: Rendering, *, is_streaming: bool, before_end: BeforeEnd | None = None
) -> None:
    """Send the answer of an open stream, and close it.

    Args:
        before_end: Awaited when all output has come, before the client is told that it has.

    Raises:
        HeadraceError: It failed; a stream that had begun has ended with an event that says so.
    """
    watcher = asyncio.create_task(close_on_disconnect(exchange.receive, stream))
    try:
        if is_streaming:
            await _send_stream(exchange, stream, rendering, before_end)
        else:
            while not rendering.is_finished:
                rendering.add(await stream.next())
            if before_end is not None:
                await before_end(usage_of(stream))
            await exchange.respond(200, rendering.whole(usage_of(stream)), headers=rendering.headers)
    finally:
        watcher.cancel()
        stream.close()


def usage_of(stream: OutputStream) -> Usage:
    """What a stream has cost so far."""
    return Usage(
        num_prompt_tokens=stream.num_prompt_tokens,
        num_output_tokens=stream.num_output_tokens,
        num_cached_tokens=stream.num_cached_tokens,
        num_reasoning_tokens=stream.num_reasoning_tokens,
    )


async def _send_stream(exchange: Exchange, stream: OutputStream, rendering: Rendering, before_end: BeforeEnd | None) -> None:
    try:
        while not rendering.is_finished:
            piece = await stream.next()
            opening = b""
            if not exchange.status:
                await exchange.start(200, rendering.stream_headers)
                opening = rendering.begin(usage_of(stream))
            chunk = opening + rendering.add(piece)
            if chunk:
                await exchange.write(chunk)
        if before_end is not None:
            await before_end(usage_of(stream))
    except HeadraceError as error:
        if exchange.status:
            # The status is gone already: the error is the stream's last event.
            await exchange.write(rendering.fail(error), is_last=True)
        raise
    await exchange.write(rendering.finish(usage_of(stream)), is_last=True)
