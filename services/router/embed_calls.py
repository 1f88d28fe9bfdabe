"""Client calls that embed: each text is an open request of its own, few of them at a time, and their vectors are one answer.

Part of the shell. What a model's vectors can be cut to is checked here, before anything is sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import numpy as np

from headrace.errors import HeadraceError, InvalidRequestError, RequestAbortedError, RequestFailedError
from headrace.telemetry.metrics import RouterMetrics
from headrace.telemetry.traces import Context, Tracer
from services.router.backplane import Backplane
from services.router.generation import (
    Call,
    EmbedAnswer,
    EmbeddingOffer,
    EmbedRequest,
    GenerationRequest,
    OutputPiece,
    VectorArray,
)
from services.router.limits import MAX_INPUTS, refuse
from services.router.open_request import Kind, OpenRequest

OPEN_TEXTS_MAX: Final = 64
"""Texts of one call that are open at a time: enough to fill a few steps of a worker, few enough to leave room for others."""


class _Turnstile(Protocol):
    """Counts open requests."""

    def enter(self, now_ns: int, num_choices: int = 1) -> None:
        """Count some in, or refuse them."""

    def leave(self, now_ns: int, num_choices: int = 1) -> None:
        """Count them out."""


_TEXT_FIELDS: Final = frozenset({"prompt", "input", "text", "tokens"})
"""What other stages call a text."""

NewRequest = Callable[[Kind, GenerationRequest, Call, int], OpenRequest]
"""Makes the open request of that number of a call."""


class _TextReader:
    """One text: its answer, awaited. Implements `Reader`."""

    def __init__(self, call: Call, request: OpenRequest, tracer: Tracer) -> None:
        self.context: Context = call.context
        self.deadline_unix_ns = call.started_unix_ns + (request.deadline_ns - call.started_ns)
        self.seed = 0
        self.answer: asyncio.Future[VectorArray] = asyncio.get_running_loop().create_future()
        self._vector: VectorArray | None = None
        self._tracer = tracer

    def on_arrival(self, edge: str, *, num_tokens: int, enqueued_unix_ns: int, now_ns: int) -> None:
        """An answer has come from a link."""
        self._tracer.record_queue(edge, parent=self.context, enqueued_unix_ns=enqueued_unix_ns, taken_unix_ns=time.time_ns())

    def share_tokens(self) -> None:
        """There are no choices here."""

    def deliver(self, piece: OutputPiece) -> None:
        """The vector."""
        self._vector = piece.vector

    def end(self, error: HeadraceError | None) -> None:
        """The text is over."""
        if self.answer.done():
            return
        if self._vector is not None:
            self.answer.set_result(self._vector)
        else:
            self.answer.set_exception(error or RequestFailedError("a text was answered without its vector"))


class EmbedCalls:
    """Answers calls that embed."""

    def __init__(
        self,
        new_request: NewRequest,
        turnstile: _Turnstile,
        backplane: Backplane,
        *,
        tracer: Tracer,
        metrics: RouterMetrics,
    ) -> None:
        self._new_request = new_request
        self._turnstile = turnstile
        self._backplane = backplane
        self._tracer = tracer
        self._metrics = metrics

    async def embed(self, request: EmbedRequest, call: Call) -> EmbedAnswer:
        """One vector a text; see `Engine.embed`."""
        num_inputs = len(request.inputs)
        if not 1 <= num_inputs <= MAX_INPUTS:
            refuse(request.param, f"1 to {MAX_INPUTS} texts", f"{num_inputs} of them")
        model = self._backplane.directory.resolve_model(request.model, time.monotonic_ns(), embeds=True)
        offer = self._backplane.directory.known_models.embedding_of(model)
        if request.dimensions is not None:
            check_dimensions(model, offer, request.dimensions)
        num_open = min(num_inputs, OPEN_TEXTS_MAX)
        requests = [
            self._new_request(Kind.EMBED, GenerationRequest(model, prompt, tenant=call.tenant), call, index)
            for index, prompt in enumerate(request.inputs)
        ]
        self._turnstile.enter(time.monotonic_ns(), num_open)
        try:
            found = await self._run_all(requests, call, num_open, request.param)
        finally:
            self._turnstile.leave(time.monotonic_ns(), num_open)
        vectors = np.stack([found[index] for index in range(num_inputs)])
        num_tokens = tuple(0 if one.encoded is None else int(one.encoded.token_ids.size) for one in requests)
        self._metrics.prompt_tokens.inc(sum(num_tokens))
        return EmbedAnswer(model, cut(vectors, request.dimensions), num_tokens)

    async def _run_all(self, requests: list[OpenRequest], call: Call, num_open: int, param: str) -> dict[int, VectorArray]:
        """Run them, so many at a time, and give their vectors by their number; the first failure ends all."""
        waiting = iter(enumerate(requests))
        found: dict[int, VectorArray] = {}
        name = "" if len(requests) == 1 else param
        runs = [asyncio.create_task(self._run_some(waiting, found, call, name)) for _ in range(num_open)]
        try:
            await asyncio.gather(*runs)
        except InvalidRequestError as error:
            # Other stages know a text by the names that it has in other calls.
            raise _about(error, param) from error
        finally:
            for run in runs:
                run.cancel()
            await asyncio.gather(*runs, return_exceptions=True)
        return found

    async def _run_some(
        self, waiting: Iterator[tuple[int, OpenRequest]], found: dict[int, VectorArray], call: Call, param: str
    ) -> None:
        for index, request in waiting:
            reader = _TextReader(call, request, self._tracer)
            self._backplane.open(request, reader)
            try:
                found[index] = await reader.answer
            except InvalidRequestError as error:
                raise (_about(error, f"{param}.{index}") if param else error) from error
            finally:
                self._backplane.end(request.request_id, RequestAbortedError("the client went away"))


def _about(error: InvalidRequestError, param: str) -> InvalidRequestError:
    """The same error, said of a field of the client's own request."""
    if error.param not in _TEXT_FIELDS or error.param == param:
        return error
    return type(error)(f"{param}: {error.message.removeprefix(f'{error.param}: ')}", param=param)


def check_dimensions(model: str, offer: EmbeddingOffer | None, dimensions: int) -> None:
    """Refuse a size to which a model's vectors cannot be cut. While nothing is known of the model, nothing is refused.

    Raises:
        InvalidRequestError: It names the sizes.
    """
    if offer is None or dimensions == offer.size:
        return
    if not offer.is_matryoshka:
        refuse("dimensions", f"left out, or {offer.size}: vectors of {model!r} cannot be cut", dimensions)
    if offer.dimensions and dimensions not in offer.dimensions:
        refuse("dimensions", f"one of {', '.join(map(str, (*offer.dimensions, offer.size)))}", dimensions)
    if not 1 <= dimensions <= offer.size:
        refuse("dimensions", f"in [1, {offer.size}]", dimensions)


def cut(vectors: VectorArray, dimensions: int | None) -> VectorArray:
    """The first numbers of vectors, brought to length 1 where any were left out."""
    if dimensions is None or dimensions >= vectors.shape[1]:
        return vectors
    head = vectors[:, :dimensions]
    lengths = np.linalg.norm(head, axis=1, keepdims=True)
    return np.asarray(head / np.maximum(lengths, np.finfo(np.float32).tiny), dtype=np.float32)
