"""The router's side of its links: what comes in goes to the core, what the core asks for goes out.

Every handler is synchronous and short. Work that cannot be sent is told to the request it belongs to, which decides; an abort or a
close that finds a full queue is kept and sent again at the next tick.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from headrace.errors import HeadraceError, OverloadedError, ProtocolError, ReplicaDeadError
from headrace.telemetry import logs
from headrace.telemetry.metrics import RouterMetrics
from headrace.telemetry.traces import Context
from headrace.v1 import detokenizer_pb2 as detokenizer
from headrace.v1 import router_pb2 as router
from headrace.v1 import scheduler_pb2 as scheduler
from headrace.wire.envelope import int32_array
from headrace.wire.session import Peer
from headrace.wire.topology import ROLES
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
)
from services.router.directory import Directory, Instance, Report
from services.router.open_request import DETOKENIZER, OpenRequest
from services.router.streams import Streams

log = logs.get_logger()

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

    def deliver(self, text: str, token_ids: tuple[int, ...], finish_reason: str | None) -> None:
        """New output."""
        ...

    def end(self, error: HeadraceError | None) -> None:
        """There is no more; called once."""
        ...


class Backplane:
    """Handles the links to tokenizers, schedulers and detokenizers."""

    def __init__(self, directory: Directory, metrics: RouterMetrics, clock: Clock) -> None:
        self.directory = directory
        self.streams = Streams()
        self._metrics = metrics
        self._clock = clock
        self._peers: dict[int, Peer] = {}
        self._readers: dict[str, Reader] = {}
        self._unsent: deque[SendAbort | SendCloseStream] = deque()
        self._arms: Mapping[str, Any] = {
            "tokenize_reply": self._on_tokenize_reply,
            "detokenize_reply": self._on_detokenize_reply,
            "accepted": self._on_accepted,
            "rejected": self._on_rejected,
            "output_deltas": self._on_output_deltas,
            "stream_gap": self._on_stream_gap,
        }

    def open(self, request: OpenRequest, reader: Reader) -> None:
        """Begin a request; its reader hears of everything, also of an error at once."""
        self._readers[request.request_id] = reader
        self._perform(self.streams.open(request, self._clock.monotonic_ns()))

    def end(self, request_id: str, error: HeadraceError) -> None:
        """End a request from our side. Unknown ones are ignored."""
        self._perform(self.streams.end(request_id, error))

    def tick(self) -> None:
        """Timers of open requests, and what could not be sent before."""
        self._perform(self.streams.on_time(self._clock.monotonic_ns()))
        unsent, self._unsent = self._unsent, deque()
        self._perform(unsent)

    # From the links.

    def on_peer(self, peer: Peer) -> None:
        """An instance registered: what waited for one goes on."""
        now_ns = self._clock.monotonic_ns()
        self._peers[peer.incarnation] = peer
        offers = {offer.name: offer for offer in messages.offers(peer.models)}
        self.directory.add(Instance(ROLES[peer.role], peer.incarnation, peer.instance, peer.address, offers), now_ns)
        self._perform(self.streams.on_capacity(now_ns))

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        """An instance is gone: what it held goes elsewhere."""
        self._peers.pop(peer.incarnation, None)
        self.directory.remove(peer.incarnation)
        num_moved = self.streams.num_held_by(peer.incarnation)
        if num_moved:
            self._metrics.moves.labels(peer.role).inc(num_moved)
            log.warning("requests.moved", num_requests=num_moved, peer=peer.instance, role=peer.role, reason=reason)
        self._perform(self.streams.on_peer_lost(peer.incarnation, self._clock.monotonic_ns()))

    def on_heartbeat(self, peer: Peer) -> None:
        """An instance told its load and state."""
        now_ns = self._clock.monotonic_ns()
        load, progress = peer.load, peer.progress
        report = Report(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_steps=progress.num_steps,
            last_step_unix_ns=progress.last_step_unix_ns,
            oldest_waiting_age_ns=progress.oldest_waiting_age_ns,
            is_draining=peer.is_draining,
            models=messages.offers(peer.models),
        )
        if self.directory.report(peer.incarnation, report, now_ns):
            self._perform(self.streams.on_capacity(now_ns))

    def on_message(self, peer: Peer, message: Any, frames: list[memoryview]) -> None:
        """An answer came."""
        arm = message.WhichOneof("body")
        handler = self._arms.get(arm)
        if handler is None:
            raise ProtocolError(f"a router does not take {arm}")
        handler(peer, message, frames)

    def _on_tokenize_reply(self, peer: Peer, message: router.RouterInbox, frames: list[memoryview]) -> None:
        reply = message.tokenize_reply
        now_ns = self._note_arrival(reply.request_id, peer, message)
        if reply.HasField("error"):
            error = messages.error_of(reply.error)
            self._perform(self.streams.on_tokenizer_error(reply.request_id, peer.incarnation, error, now_ns))
            return
        tokens = int32_array(frames[0] if frames else None, count=reply.num_tokens)
        encoded = messages.encoded_prompt(reply, tokens)
        self._perform(self.streams.on_tokens(reply.request_id, peer.incarnation, encoded, now_ns))

    def _on_detokenize_reply(self, peer: Peer, message: router.RouterInbox, frames: list[memoryview]) -> None:
        reply = message.detokenize_reply
        now_ns = self._note_arrival(reply.request_id, peer, message)
        if reply.HasField("error"):
            error = messages.error_of(reply.error)
            self._perform(self.streams.on_tokenizer_error(reply.request_id, peer.incarnation, error, now_ns))
            return
        self._perform(self.streams.on_text(reply.request_id, peer.incarnation, reply.text))

    def _on_accepted(self, peer: Peer, message: router.RouterInbox, frames: list[memoryview]) -> None:
        self.streams.on_accepted(message.accepted.request_id, peer.incarnation, self._clock.monotonic_ns())

    def _on_rejected(self, peer: Peer, message: router.RouterInbox, frames: list[memoryview]) -> None:
        rejected = message.rejected
        now_ns = self._note_arrival(rejected.request_id, peer, message)
        error = messages.error_of(rejected.error)
        self._perform(self.streams.on_rejected(rejected.request_id, peer.incarnation, error, now_ns))

    def _on_output_deltas(self, peer: Peer, message: router.RouterInbox, frames: list[memoryview]) -> None:
        deltas = message.output_deltas
        now_ns = self._clock.monotonic_ns()
        incarnation, streams = peer.incarnation, self.streams
        for stream_id, output in messages.outputs(deltas):
            request = streams.get_by_stream(stream_id)
            if request is None:
                continue
            reader = self._readers[request.request_id]
            actions = streams.on_output(stream_id, incarnation, output, now_ns)
            if not actions:
                continue
            if isinstance(actions[0], Deliver):
                reader.on_arrival(
                    peer.edge.name, num_tokens=len(output.token_ids), enqueued_unix_ns=deltas.enqueued_unix_ns, now_ns=now_ns
                )
            self._perform(actions)

    def _on_stream_gap(self, peer: Peer, message: router.RouterInbox, frames: list[memoryview]) -> None:
        gap = message.stream_gap
        self._perform(self.streams.on_gap(gap.stream_id, peer.incarnation, gap.expected_position))

    def _note_arrival(self, request_id: str, peer: Peer, message: router.RouterInbox) -> int:
        now_ns = self._clock.monotonic_ns()
        reader = self._readers.get(request_id)
        if reader is not None:
            reader.on_arrival(peer.edge.name, num_tokens=0, enqueued_unix_ns=message.header.sent_unix_ns, now_ns=now_ns)
        return now_ns

    # To the links.

    def _perform(self, actions: Iterable[Action]) -> None:
        queue = deque(actions)
        while queue:
            action = queue.popleft()
            if isinstance(action, Deliver):
                self._readers[action.request.request_id].deliver(action.text, action.token_ids, action.finish_reason)
            elif isinstance(action, End):
                self._readers.pop(action.request.request_id).end(action.error)
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
            return self.streams.on_unsent(request, [action, *later], error, self._clock.monotonic_ns())
        return []

    def _message(self, action: SendWork) -> messages.WorkMessage:
        request = action.request
        reader = self._readers[request.request_id]
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
            case SendSubmit():
                return messages.submit(request, work, seed=reader.seed, target=self._target(request))
            case SendRedirect():
                body = scheduler.Redirect(
                    request_id=request.request_id, detokenizer=self._target(request), from_position=action.from_position
                )
                return "redirect", body, []

    def _target(self, request: OpenRequest) -> scheduler.DetokenizerTarget:
        instance = self.directory.get(request.held[DETOKENIZER])
        if instance is None:
            raise ReplicaDeadError("the detokenizer is gone")
        return scheduler.DetokenizerTarget(address=instance.address, incarnation=instance.incarnation)

    def _send_release(self, action: SendAbort | SendCloseStream) -> None:
        peer = self._peers.get(action.to)
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
        peer = self._peers.get(incarnation)
        if peer is None:
            raise ReplicaDeadError("the peer is gone")
        return peer
