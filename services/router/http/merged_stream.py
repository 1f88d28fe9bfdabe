"""Several prompts of one client call, each a call of its own below the client's, read as one stream. Part of the shell."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.errors import HeadraceError
from services.router.generation import Call, Engine, GenerationRequest, OutputStream
from services.router.http.exchange import Exchange
from services.router.http.prompt_batch import PromptBatch
from services.router.http.rendering import Usage
from services.router.http.serving import open_stream_for, usage_of


class MergedStream(PromptBatch):
    """Implements `OutputStream`; choice `c` of prompt `p` has the number `p * num_choices + c`."""

    def __init__(
        self, exchange: Exchange, engine: Engine, generations: Sequence[GenerationRequest], *, user: str | None, endpoint: str
    ) -> None:
        """Begin them all, or none.

        Raises:
            HeadraceError: One could not begin.
        """
        streams: list[OutputStream] = []
        super().__init__(streams, num_choices=generations[0].num_choices)
        self._engine = engine
        self._calls: list[Call] = []
        self._is_closed = False
        try:
            for generation in generations:
                call = self._begin_call(exchange, endpoint)
                streams.append(open_stream_for(call, exchange, engine, generation, user=user))
        except HeadraceError:
            self.close()
            raise
        self._num_unfinished = {index: generation.num_choices for index, generation in enumerate(generations)}

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

    def usage_of(self, prompt: int) -> Usage:
        """What one prompt has cost so far."""
        return usage_of(self._streams[prompt])

    def close(self) -> None:
        """The client is gone or has all it wanted. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        super().close()
        # The first one's call is the exchange's to end.
        for call in self._calls[1:]:
            self._engine.end_call(call, status="200")
