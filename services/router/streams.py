"""All open requests of this router: finds the one an event is for, keeps their timers.

Pure: time comes in, actions go out. A message for a request that is not open any more is ignored; that is how late and repeated
messages end.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from headrace.errors import HeadraceError
from services.router.actions import Action, SendWork
from services.router.generation import EncodedPrompt, ModelDescription, VectorArray
from services.router.open_request import OpenRequest, Output, take_vector


class Streams:
    """The table of open requests."""

    def __init__(self) -> None:
        self._by_id: dict[str, OpenRequest] = {}
        self._by_stream: dict[int, OpenRequest] = {}
        self._waiting: dict[str, OpenRequest] = {}
        self._timers: list[tuple[int, str]] = []
        self._timer_at: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[OpenRequest]:
        return iter(list(self._by_id.values()))

    def get_by_stream(self, stream_id: int) -> OpenRequest | None:
        """The open request whose stream has that number."""
        return self._by_stream.get(stream_id)

    def open(self, request: OpenRequest, now_ns: int) -> list[Action]:
        """Take a new request up."""
        self._by_id[request.request_id] = request
        self._by_stream[request.stream_id] = request
        return self._after(request, request.advance(now_ns))

    def on_tokenized(self, request_id: str, peer: int, answer: EncodedPrompt | ModelDescription | str, now_ns: int) -> list[Action]:
        """A tokenizer sent a prompt's tokens, the text of tokens, or what its model is."""
        request = self._by_id.get(request_id)
        return [] if request is None else self._after(request, request.on_tokenized(peer, answer, now_ns))

    def on_vector(self, request_id: str, peer: int, vector: VectorArray) -> list[Action]:
        """A scheduler sent the vector of a text."""
        request = self._by_id.get(request_id)
        return [] if request is None else self._after(request, take_vector(request, peer, vector))

    def on_refused(self, request_id: str, role: int, peer: int, *, error: HeadraceError, now_ns: int) -> list[Action]:
        """A stage will not serve a request, or serve it no further."""
        request = self._by_id.get(request_id)
        return [] if request is None else self._after(request, request.on_refused(role, peer, error, now_ns))

    def on_output(self, stream_id: int, peer: int, output: Output, now_ns: int) -> list[Action]:
        """A detokenizer sent output of a stream."""
        request = self._by_stream.get(stream_id)
        if request is None:
            return []
        actions = request.on_output(peer, output, now_ns)
        if request.stream_id != stream_id:
            del self._by_stream[stream_id]
            self._by_stream[request.stream_id] = request
        # In the common case, one Deliver, no timer has come nearer and nothing waits.
        return actions if len(actions) == 1 and not request.is_finished else self._after(request, actions)

    def on_gap(self, stream_id: int, peer: int, expected_position: int) -> list[Action]:
        """A detokenizer missed tokens of a stream."""
        request = self._by_stream.get(stream_id)
        return [] if request is None else self._after(request, request.on_gap(peer, expected_position))

    def on_peer_lost(self, peer: int, now_ns: int) -> list[Action]:
        """An instance is gone: its requests move."""
        actions: list[Action] = []
        for request in self:
            actions += self._after(request, request.on_peer_lost(peer, now_ns))
        return actions

    def num_held_by(self, peer: int) -> int:
        """How many open requests an instance holds."""
        return sum(peer in request.places.held.values() for request in self._by_id.values())

    def on_capacity(self, now_ns: int) -> list[Action]:
        """An instance came, or offers more than before: whatever waits may go on."""
        actions: list[Action] = []
        for request in list(self._waiting.values()):
            actions += self._after(request, request.advance(now_ns))
        return actions

    def on_unsent(self, request: OpenRequest, unsent: Sequence[SendWork], error: HeadraceError, now_ns: int) -> list[Action]:
        """Work for a request could not be sent."""
        return self._after(request, request.on_unsent(unsent, error, now_ns))

    def end(self, request_id: str, error: HeadraceError) -> list[Action]:
        """End a request from our side: its client is gone, or too slow."""
        request = self._by_id.get(request_id)
        return [] if request is None else self._after(request, request.end(error))

    def on_time(self, now_ns: int) -> list[Action]:
        """Run the timers that are due."""
        due = []
        while self._timers and self._timers[0][0] <= now_ns:
            due.append(heapq.heappop(self._timers))
        actions: list[Action] = []
        for due_ns, request_id in due:
            request = self._by_id.get(request_id)
            if request is None or self._timer_at.get(request_id) != due_ns:
                continue
            del self._timer_at[request_id]
            actions += self._after(request, request.on_time(now_ns) if request.due_ns() <= now_ns else [])
        return actions

    def _after(self, request: OpenRequest, actions: list[Action]) -> list[Action]:
        request_id = request.request_id
        if request.is_finished:
            self._by_id.pop(request_id, None)
            self._by_stream.pop(request.stream_id, None)
            self._waiting.pop(request_id, None)
            self._timer_at.pop(request_id, None)
            return actions
        if request.places.waiting_for is None:
            self._waiting.pop(request_id, None)
        else:
            self._waiting[request_id] = request
        due_ns = request.due_ns()
        set_ns = self._timer_at.get(request_id)
        if set_ns is None or due_ns < set_ns:
            self._timer_at[request_id] = due_ns
            heapq.heappush(self._timers, (due_ns, request_id))
        return actions
