"""What comes in over the router's links goes to the core; `courier.py` carries out what the core then asks for.

Every handler is synchronous and short.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.errors import HeadraceError, ProtocolError
from headrace.telemetry import logs
from headrace.telemetry.metrics import RouterMetrics
from headrace.v1 import router_pb2 as router
from headrace.wire.session import Peer
from headrace.wire.topology import ROLES
from services.router import messages
from services.router.actions import Deliver
from services.router.cache_calls import CacheCalls
from services.router.courier import Clock, Courier, Reader
from services.router.directory import Directory, Instance, Report
from services.router.open_request import OpenRequest
from services.router.places import SCHEDULER, TOKENIZER
from services.router.streams import Streams

log = logs.get_logger()


class Backplane:
    """Handles the links to tokenizers, schedulers and detokenizers."""

    def __init__(self, directory: Directory, metrics: RouterMetrics, clock: Clock) -> None:
        self.directory = directory
        self.streams = Streams()
        self._metrics = metrics
        self._clock = clock
        self._courier = Courier(self.streams, directory, clock)
        self.caches = CacheCalls(directory, self._courier.peers)
        self._arms: Mapping[str, Any] = {
            "tokenize_reply": self._on_tokenizer_reply,
            "detokenize_reply": self._on_tokenizer_reply,
            "describe_reply": self._on_tokenizer_reply,
            "accepted": self._on_accepted,
            "rejected": self._on_rejected,
            "embeddings": self._on_embeddings,
            "output_deltas": self._on_output_deltas,
            "stream_gap": self._on_stream_gap,
            "cache_events": self.caches.on_events,
            "cache_flushed": self.caches.on_flushed,
        }

    def open(self, request: OpenRequest, reader: Reader) -> None:
        """Begin a request; its reader hears of everything, also of an error at once."""
        self._courier.readers[request.request_id] = reader
        self._courier.perform(self.streams.open(request, self._clock.monotonic_ns()))

    def end(self, request_id: str, error: HeadraceError) -> None:
        """End a request from our side. Unknown ones are ignored."""
        self._courier.perform(self.streams.end(request_id, error))

    def end_all(self, error: HeadraceError) -> None:
        """End every open request with an error."""
        for request in self.streams:
            self.end(request.request_id, error)

    def tick(self) -> bool:
        """Timers of open requests, and what could not be sent before; whether the next tick may have to do something."""
        self._courier.perform(self.streams.on_time(self._clock.monotonic_ns()))
        self._courier.send_unsent()
        self.caches.watch()
        return bool(len(self.streams) or self._courier.has_unsent)

    # From the links.

    def on_peer(self, peer: Peer) -> None:
        """An instance registered: what waited for one goes on."""
        now_ns = self._clock.monotonic_ns()
        self._courier.peers[peer.incarnation] = peer
        offers = {offer.name: offer for offer in messages.offers(peer.models)}
        self.directory.add(Instance(ROLES[peer.role], peer.incarnation, peer.instance, peer.address, offers), now_ns)
        self._courier.perform(self.streams.on_capacity(now_ns))

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        """An instance is gone: what it held goes elsewhere."""
        self._courier.peers.pop(peer.incarnation, None)
        self.directory.remove(peer.incarnation)
        self.caches.on_peer_lost(peer.incarnation)
        num_moved = self.streams.num_held_by(peer.incarnation)
        if num_moved:
            self._metrics.moves.labels(peer.role).inc(num_moved)
            log.warning("requests.moved", num_requests=num_moved, peer=peer.instance, role=peer.role, reason=reason)
        self._courier.perform(self.streams.on_peer_lost(peer.incarnation, self._clock.monotonic_ns()))

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
            num_waiting_tokens=load.num_waiting_tokens,
            max_num_seqs=load.max_num_seqs,
            num_kv_tokens=load.num_kv_tokens,
            kv_usage=1 - load.num_free_pages / load.num_total_pages if load.num_total_pages else 0.0,
        )
        if self.directory.report(peer.incarnation, report, now_ns):
            self._courier.perform(self.streams.on_capacity(now_ns))

    def on_message(self, peer: Peer, message: Any, frames: list[memoryview]) -> None:
        """An answer came."""
        arm = message.WhichOneof("body")
        handler = self._arms.get(arm)
        if handler is None:
            raise ProtocolError(f"a router does not take {arm}")
        handler(peer, message, frames)

    def _on_tokenizer_reply(self, peer: Peer, message: router.RouterInbox, frames: list[memoryview]) -> None:
        """Tokens, text, or what the model is; or an error."""
        reply = getattr(message, str(message.WhichOneof("body")))
        now_ns = self._note_arrival(reply.request_id, peer, message)
        if reply.HasField("error"):
            error = messages.error_of(reply.error)
            self._courier.perform(
                self.streams.on_refused(reply.request_id, TOKENIZER, peer.incarnation, error=error, now_ns=now_ns)
            )
            return
        answer = messages.tokenizer_answer(reply, frames)
        self._courier.perform(self.streams.on_tokenized(reply.request_id, peer.incarnation, answer, now_ns))

    def _on_accepted(self, peer: Peer, message: router.RouterInbox, frames: list[memoryview]) -> None:
        """Nothing changes: silence, not the missing word, is what a request is asked after."""

    def _on_rejected(self, peer: Peer, message: router.RouterInbox, frames: list[memoryview]) -> None:
        rejected = message.rejected
        now_ns = self._note_arrival(rejected.request_id, peer, message)
        error = messages.error_of(rejected.error)
        self._courier.perform(self.streams.on_refused(rejected.request_id, SCHEDULER, peer.incarnation, error=error, now_ns=now_ns))

    def _on_embeddings(self, peer: Peer, message: router.RouterInbox, frames: list[memoryview]) -> None:
        for request_id, vector in messages.vectors(message.embeddings, frames):
            self._note_arrival(request_id, peer, message)
            self._courier.perform(self.streams.on_vector(request_id, peer.incarnation, vector))

    def _on_output_deltas(self, peer: Peer, message: router.RouterInbox, frames: list[memoryview]) -> None:
        deltas = message.output_deltas
        now_ns = self._clock.monotonic_ns()
        incarnation, streams = peer.incarnation, self.streams
        for stream_id, output in messages.outputs(deltas):
            request = streams.get_by_stream(stream_id)
            if request is None:
                continue
            reader = self._courier.readers[request.request_id]
            actions = streams.on_output(stream_id, incarnation, output, now_ns)
            if not actions:
                continue
            if isinstance(actions[0], Deliver):
                reader.on_arrival(
                    peer.edge.name, num_tokens=len(output.token_ids), enqueued_unix_ns=deltas.enqueued_unix_ns, now_ns=now_ns
                )
            self._courier.perform(actions)

    def _on_stream_gap(self, peer: Peer, message: router.RouterInbox, frames: list[memoryview]) -> None:
        gap = message.stream_gap
        self._courier.perform(self.streams.on_gap(gap.stream_id, peer.incarnation, gap.expected_position))

    def _note_arrival(self, request_id: str, peer: Peer, message: router.RouterInbox) -> int:
        now_ns = self._clock.monotonic_ns()
        reader = self._courier.readers.get(request_id)
        if reader is not None:
            reader.on_arrival(peer.edge.name, num_tokens=0, enqueued_unix_ns=message.header.sent_unix_ns, now_ns=now_ns)
        return now_ns
