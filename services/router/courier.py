"""Carries out what the core asks for: messages to peers, output and endings to readers.

Work that cannot be sent is told to the request it belongs to, which decides; an abort or a close that finds a full queue is kept
and sent again at the next tick.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from headrace.errors import HeadraceError, OverloadedError, ReplicaDeadError
from headrace.telemetry.traces import Context
from headrace.v1 import detokenizer_pb2 as detokenizer
from headrace.v1 import scheduler_pb2 as scheduler
from headrace.wire.session import Peer
from services.router import messages
from services.router.actions import (
    Action,
    Deliver,
    End,
    SendAbort,
    SendCloseStream,
    SendOpenStream,
    SendRedirect,
    SendSubmit,
    SendTokenize,
    SendWork,
    ShareTokens,
)
from services.router.directory import Directory
from services.router.generation import OutputPiece
from services.router.open_request import Kind, OpenRequest
from services.router.places import DETOKENIZER
from services.router.streams import Streams

_WORK = (SendTokenize, SendOpenStream, SendSubmit, SendRedirect)


@dataclass(frozen=True, slots=True)
class Clock:
    """The two times of a process, handed in by its shell."""

    monotonic_ns: Callable[[], int]
    unix_ns: Callable[[], int]


class Reader(Protocol):
    """Who waits for the output of an open request."""

    context: Context
    deadline_unix_ns: int
    seed: int

    def on_arrival(self, edge: str, *, num_tokens: int, enqueued_unix_ns: int, now_ns: int) -> None:
        """An answer for the request has come."""
        ...

    def share_tokens(self) -> None:
        """The prompt's tokens are known; called only for a request of several choices."""
        ...

    def deliver(self, piece: OutputPiece) -> None:
        """New output."""
        ...

    def end(self, error: HeadraceError | None) -> None:
        """There is no more; called once."""
        ...


class Courier:
    """Knows peers by incarnation and readers by request."""

    def __init__(self, streams: Streams, directory: Directory, clock: Clock) -> None:
        self.peers: dict[int, Peer] = {}
        self.readers: dict[str, Reader] = {}
        self._streams = streams
        self._directory = directory
        self._clock = clock
        self._unsent: deque[SendAbort | SendCloseStream] = deque()

    @property
    def has_unsent(self) -> bool:
        """Whether something waits for room in a queue."""
        return bool(self._unsent)

    def send_unsent(self) -> None:
        """Try again what found a full queue."""
        unsent, self._unsent = self._unsent, deque()
        self.perform(unsent)

    def perform(self, actions: Iterable[Action]) -> None:
        """Carry actions out, and those that follow from them."""
        queue = deque(actions)
        while queue:
            action = queue.popleft()
            if isinstance(action, Deliver):
                self.readers[action.request.request_id].deliver(action.piece)
            elif isinstance(action, End):
                self.readers.pop(action.request.request_id).end(action.error)
            elif isinstance(action, ShareTokens):
                # An action before this one may have ended the request.
                if (reader := self.readers.get(action.request.request_id)) is not None:
                    reader.share_tokens()
            elif isinstance(action, (SendAbort, SendCloseStream)):
                self._send_release(action)
            else:
                queue.extendleft(reversed(self._send_work(action, queue)))

    def _send_work(self, action: SendWork, queue: deque[Action]) -> list[Action]:
        """Send work; when it cannot be, take back what the same request wanted to send after it, and let the request decide."""
        request = action.request
        if request.is_finished:
            return []
        try:
            self._peer(action.to).send(*self._message(action))
        except (OverloadedError, ReplicaDeadError) as error:
            later = [other for other in queue if isinstance(other, _WORK) and other.request is request]
            for other in later:
                queue.remove(other)
            return self._streams.on_unsent(request, [action, *later], error, self._clock.monotonic_ns())
        return []

    def _message(self, action: SendWork) -> messages.WorkMessage:
        request = action.request
        reader = self.readers[request.request_id]
        work = messages.work_header(
            request.request_id,
            context=reader.context,
            deadline_unix_ns=reader.deadline_unix_ns,
            enqueued_unix_ns=self._clock.unix_ns(),
        )
        match action:
            case SendTokenize():
                return messages.tokenize(request, work)
            case SendOpenStream():
                return messages.open_stream(request, work)
            case SendSubmit() if request.kind is Kind.EMBED:
                return messages.submit_text(request, work)
            case SendSubmit():
                return messages.submit(request, work, seed=reader.seed, target=self._target(request))
            case SendRedirect():
                body = scheduler.Redirect(
                    request_id=request.request_id, detokenizer=self._target(request), from_position=action.from_position
                )
                return "redirect", body, []

    def _target(self, request: OpenRequest) -> scheduler.DetokenizerTarget:
        instance = self._directory.get(request.places.held[DETOKENIZER])
        if instance is None:
            raise ReplicaDeadError("the detokenizer is gone")
        return scheduler.DetokenizerTarget(address=instance.address, incarnation=instance.incarnation)

    def _send_release(self, action: SendAbort | SendCloseStream) -> None:
        peer = self.peers.get(action.to)
        if peer is None:
            # Whoever is gone holds nothing.
            return
        try:
            if isinstance(action, SendAbort):
                peer.send("abort", scheduler.Abort(request_ids=[action.request_id]))
            else:
                peer.send("close_stream", detokenizer.CloseStream(stream_ids=[action.stream_id]))
        except OverloadedError:
            self._unsent.append(action)
        except ReplicaDeadError:
            return

    def _peer(self, incarnation: int) -> Peer:
        peer = self.peers.get(incarnation)
        if peer is None:
            raise ReplicaDeadError("the peer is gone")
        return peer
