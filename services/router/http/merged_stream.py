"""Several prompts of one client call, read as one stream. Part of the shell.

Each prompt is a request of its own, with a call of its own below the client's. The first error ends all: a client cannot be told of
one alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from headrace.errors import HeadraceError, RequestAbortedError
from services.router.generation import Call, Engine, GenerationRequest, OutputPiece, OutputStream
from services.router.http.exchange import Exchange
from services.router.http.rendering import Usage
from services.router.http.serving import open_stream_for, usage_of

_UNREAD_MAX = 64


class MergedStream:
    """Implements `OutputStream`; choice `c` of prompt `p` has the number `p * num_choices + c`."""

    def __init__(
        self, exchange: Exchange, engine: Engine, generations: Sequence[GenerationRequest], *, user: str | None, endpoint: str
    ) -> None:
        """Begin them all, or none.

        Raises:
            HeadraceError: One could not begin.
        """
        self._engine = engine
        self._num_choices = generations[0].num_choices
        self._unread: asyncio.Queue[OutputPiece | HeadraceError] = asyncio.Queue(_UNREAD_MAX)
        self._pumps: list[asyncio.Task[None]] = []
        self._calls: list[Call] = []
        self._streams: list[OutputStream] = []
        self._is_closed = False
        try:
            for generation in generations:
                call = self._begin_call(exchange, endpoint)
                self._streams.append(open_stream_for(call, exchange, engine, generation, user=user))
        except HeadraceError:
            self.close()
            raise

    def _begin_call(self, exchange: Exchange, endpoint: str) -> Call:
        own = exchange.open_call
        if not self._calls:
            # The first prompt's is the client's own.
            self._calls.append(own)
            return own
        context = own.context
        call = self._engine.begin_call(
            protocol="http", endpoint=endpoint, traceparent=context.traceparent, tracestate=context.tracestate
        )
        call.timeout_s, call.cut, call.is_streaming = own.timeout_s, own.cut, own.is_streaming
        self._calls.append(call)
        return call

    @property
    def model(self) -> str:
        """The model that answers."""
        return self._streams[0].model

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(stream.num_prompt_tokens for stream in self._streams)

    @property
    def num_output_tokens(self) -> int:
        """Tokens made so far."""
        return sum(stream.num_output_tokens for stream in self._streams)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens whose KV was reused."""
        return sum(stream.num_cached_tokens for stream in self._streams)

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens made so far that were reasoning."""
        return sum(stream.num_reasoning_tokens for stream in self._streams)

    def usage_of(self, prompt: int) -> Usage:
        """What one prompt has cost so far."""
        return usage_of(self._streams[prompt])

    async def next(self) -> OutputPiece:
        """New output of one choice of one prompt, waiting for some."""
        if not self._pumps:
            self._pumps = [asyncio.create_task(self._pump(index)) for index in range(len(self._streams))]
        piece = await self._unread.get()
        if isinstance(piece, HeadraceError):
            raise piece
        return piece

    async def _pump(self, prompt: int) -> None:
        num_unfinished = self._num_choices
        try:
            while num_unfinished:
                piece = await self._streams[prompt].next()
                num_unfinished -= piece.finish_reason is not None
                await self._unread.put(replace(piece, choice=prompt * self._num_choices + piece.choice))
        except HeadraceError as error:
            await self._unread.put(error)

    def close(self) -> None:
        """The client is gone or has all it wanted. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        for pump in self._pumps:
            pump.cancel()
        for stream in self._streams:
            stream.close()
        # The first one's call is the exchange's to end.
        for call in self._calls[1:]:
            self._engine.end_call(call, status="200")
        if self._unread.empty():
            self._unread.put_nowait(RequestAbortedError("the client went away"))
