"""What a router has to do with the schedulers' prefix caches: it follows them where there is a choice, and has them flushed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from headrace.errors import OverloadedError, ReplicaDeadError, UnavailableError
from headrace.telemetry import logs
from headrace.v1 import router_pb2 as router
from headrace.v1 import scheduler_pb2 as scheduler
from headrace.wire.session import Peer
from services.router import messages
from services.router.directory import Directory
from services.router.kv_mirror import KvMirror, KvReader
from services.router.places import SCHEDULER

log = logs.get_logger()


@dataclass(slots=True)
class _Flush:
    """Under way: schedulers that have not answered, whom to tell, and the pages so far."""

    missing: set[int]
    on_done: Callable[[int], None]
    num_pages: int = 0


class CacheCalls:
    """Subscriptions and flushes.

    Args:
        directory: Who is there; it keeps what is known of their caches.
        peers: By incarnation.
    """

    def __init__(self, directory: Directory, peers: Mapping[int, Peer]) -> None:
        self._directory = directory
        self._peers = peers
        self.mirror = KvMirror()
        self._watched: dict[int, bool] = {}
        self._flushes: dict[str, _Flush] = {}

    def watch(self) -> None:
        """Follow all schedulers where there are several, or a gateway reads along. A full queue is tried again at the next tick."""
        schedulers = self._directory.incarnations(SCHEDULER)
        with_tokens = self.mirror.has_readers
        if not with_tokens and (not self._directory.is_cache_aware or len(schedulers) < 2):
            return
        for incarnation in schedulers:
            told = self._watched.get(incarnation)
            if told or told is with_tokens:
                continue
            try:
                self._peers[incarnation].send("subscribe_cache", scheduler.SubscribeCache(with_tokens=with_tokens))
            except (OverloadedError, ReplicaDeadError):
                continue
            self._watched[incarnation] = with_tokens

    def read(self, wake: Callable[[], object]) -> KvReader:
        """Read along what all lanes have cached, for a gateway; to be closed at the mirror."""
        if not self.mirror.has_readers:
            # What is there already has to be told again, with tokens.
            self._watched.clear()
        reader = self.mirror.open(wake)
        self.watch()
        return reader

    def close(self, reader: KvReader) -> None:
        """A gateway leaves."""
        self.mirror.close(reader)

    def on_events(self, peer: Peer, message: router.RouterInbox, frames: list[memoryview]) -> None:
        """A scheduler tells of its cache; where something was missed, it is asked for everything again."""
        news = messages.lane_news(message.cache_events, frames)
        if self._directory.prefixes.update(peer.incarnation, news):
            self.mirror.update(peer.incarnation, news)
        else:
            log.info("cache_events.missed", peer=peer.instance)
            self._watched.pop(peer.incarnation, None)

    def flush(self, call_id: str, on_done: Callable[[int], None]) -> None:
        """Have every scheduler drop its cached prefixes; `on_done` hears the pages dropped when all have answered or gone.

        Raises:
            UnavailableError: There is no scheduler.
            OverloadedError: One cannot be told now.
            ReplicaDeadError: One has just gone.
        """
        schedulers = self._directory.incarnations(SCHEDULER)
        if not schedulers:
            raise UnavailableError("router: no scheduler is registered, so there is no cache to flush")
        self._flushes[call_id] = _Flush(set(schedulers), on_done)
        for incarnation in schedulers:
            self._peers[incarnation].send("flush_cache", scheduler.FlushCache(call_id=call_id))

    def forget_flush(self, call_id: str) -> None:
        """Nobody waits for the answers any more."""
        self._flushes.pop(call_id, None)

    def on_flushed(self, peer: Peer, message: router.RouterInbox, frames: list[memoryview]) -> None:
        """A scheduler has dropped its cached prefixes."""
        self._note_flushed(message.cache_flushed.call_id, peer.incarnation, message.cache_flushed.num_pages)

    def on_peer_lost(self, incarnation: int) -> None:
        """An instance is gone, and its cache with it."""
        self._watched.pop(incarnation, None)
        self.mirror.forget(incarnation)
        for call_id in list(self._flushes):
            self._note_flushed(call_id, incarnation, 0)

    def _note_flushed(self, call_id: str, incarnation: int, num_pages: int) -> None:
        flush = self._flushes.get(call_id)
        if flush is None or incarnation not in flush.missing:
            return
        flush.missing.discard(incarnation)
        flush.num_pages += num_pages
        if not flush.missing:
            del self._flushes[call_id]
            flush.on_done(flush.num_pages)
