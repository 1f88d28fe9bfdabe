"""The table of streams: who gets which text, and what each batch of tokens means.

Owns every stream, the tokens that came too early, and a memory of streams that are over. Synchronous and without a clock: the
shell (service.py) hands in messages with a time and sends what the outboxes hold.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from headrace.errors import OverloadedError, ProtocolError
from headrace.v1.common_pb2 import FinishReason
from services.detokenizer.incremental_decoder import IncrementalDecoder
from services.detokenizer.logprobs import Told
from services.detokenizer.outbox import Outbox
from services.detokenizer.parsers.output_parser import ReadingOptions
from services.detokenizer.pending_tokens import PendingTokens, TokenEntry
from services.detokenizer.stop_strings import StopMatcher
from services.detokenizer.stream import NOT_FINISHED, Outcome, Stream
from services.detokenizer.stream_reader import SentCounts, StreamReader
from services.detokenizer.token_table import TableChoice, TokenTable


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Bounds of the table."""

    streams_max: int = 65536
    """Open streams, and as many remembered ones that are over."""
    pending_tokens_max: int = 262_144
    """Tokens kept for streams not opened yet, over all of them."""
    pending_age_max_ns: int = 30_000_000_000
    """How long they are kept."""
    unsent_tokens_max: int = 4096
    """Unsent tokens of one stream before it is rewound."""
    repeat_after_ns: int = 1_000_000_000
    """A gap or a stop that stands is told again after this time, when tokens still come."""


@dataclass(frozen=True, slots=True)
class StreamStart:
    """What a router says when it opens a stream."""

    stream_id: int
    stops: Sequence[str] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    history: Sequence[int] = ()
    num_output_tokens: int = 0
    num_sent_chars: int = 0
    reading: ReadingOptions | None = None
    sent: SentCounts = field(default_factory=SentCounts)


@dataclass(slots=True)
class Batch:
    """A token batch as arrays, one entry a stream; empty `num_tokens` means one each, other empty arrays mean none."""

    stream_ids: Sequence[int]
    first_positions: Sequence[int]
    token_ids: Sequence[int]
    num_tokens: Sequence[int] = ()
    finish_reasons: Sequence[FinishReason] = ()
    num_stop_tokens: Sequence[int] = ()
    num_cached_tokens: Sequence[int] = ()
    told: Mapping[int, Told] = field(default_factory=dict)
    """Logprobs, by stream number."""

    def check(self) -> None:
        """Refuse arrays that contradict each other.

        Raises:
            ProtocolError: An array has a wrong length.
        """
        num_streams = len(self.stream_ids)
        if len(self.first_positions) != num_streams:
            raise ProtocolError(f"token batch: {len(self.first_positions)} first_positions for {num_streams} streams")
        for name in ("num_tokens", "finish_reasons", "num_stop_tokens", "num_cached_tokens"):
            if len(getattr(self, name)) not in (0, num_streams):
                raise ProtocolError(f"token batch: {len(getattr(self, name))} {name} for {num_streams} streams")
        num_tokens = sum(self.num_tokens) if self.num_tokens else num_streams
        if len(self.token_ids) != num_tokens:
            raise ProtocolError(f"token batch: {len(self.token_ids)} token_ids where num_tokens says {num_tokens}")

    def split(self, tokens_max: int) -> Iterator[Batch]:
        """Cut the batch between streams so that no part has more than `tokens_max` tokens, unless one stream alone has."""
        if len(self.token_ids) <= tokens_max:
            yield self
            return
        begin = begin_token = end_token = 0
        for end in range(len(self.stream_ids)):
            num_tokens = self.num_tokens[end] if self.num_tokens else 1
            if end > begin and end_token + num_tokens - begin_token > tokens_max:
                yield self._part(slice(begin, end), slice(begin_token, end_token))
                begin, begin_token = end, end_token
            end_token += num_tokens
        yield self._part(slice(begin, len(self.stream_ids)), slice(begin_token, end_token))

    def _part(self, streams: slice, tokens: slice) -> Batch:
        return Batch(
            self.stream_ids[streams],
            self.first_positions[streams],
            self.token_ids[tokens],
            self.num_tokens[streams],
            self.finish_reasons[streams],
            self.num_stop_tokens[streams],
            self.num_cached_tokens[streams],
            self.told,
        )


@dataclass(slots=True)
class BatchEffects:
    """What follows from a batch besides text."""

    owners: set[int] = field(default_factory=set)
    """Routers whose outbox has something to send."""
    stops: dict[int, list[int]] = field(default_factory=dict)
    """Streams that are over, by the scheduler that must be told."""
    num_stopped: int = 0
    num_gaps: int = 0
    num_evicted: int = 0


@dataclass(slots=True)
class _Over:
    """A stream that is over. `told_ns`: when a scheduler was last told to stop it; None when a scheduler ended it itself."""

    is_stopped: bool
    told_ns: int | None


class StreamTable:
    """All streams of one model."""

    def __init__(self, table: TokenTable, limits: StreamLimits) -> None:
        self._table = table
        self.pieces: Sequence[bytes] = table.pieces
        """Bytes of each token id, special tokens included."""
        self._tables = TableChoice(table)
        self._limits = limits
        self._streams: dict[int, Stream] = {}
        self._over: OrderedDict[int, _Over] = OrderedDict()
        self._pending = PendingTokens(tokens_max=limits.pending_tokens_max, age_max_ns=limits.pending_age_max_ns)
        self._outboxes: dict[int, Outbox] = {}

    def __len__(self) -> int:
        """Open streams."""
        return len(self._streams)

    @property
    def num_pending(self) -> int:
        """Streams whose tokens came before them."""
        return len(self._pending)

    def outbox(self, owner: int) -> Outbox:
        """What waits for one router."""
        outbox = self._outboxes.get(owner)
        if outbox is None:
            outbox = self._outboxes[owner] = Outbox()
        return outbox

    def unsent_owners(self) -> list[int]:
        """Routers for whom something waits."""
        return [owner for owner, outbox in self._outboxes.items() if not outbox.is_empty]

    def open(self, start: StreamStart, *, owner: int, now_ns: int) -> BatchEffects:
        """Begin a stream, or begin it again; tokens that came before it are taken now.

        Raises:
            OverloadedError: There are too many streams. Nothing was opened: `refuse` tells the router.
            ProtocolError: The history is shorter than it claims, or the text cannot be read as asked. Likewise.
        """
        former = self._streams.get(start.stream_id)
        if former is None and len(self._streams) >= self._limits.streams_max:
            raise OverloadedError(f"detokenizer: {len(self._streams)} streams are open, the most that streams_max allows")
        if start.num_output_tokens > len(start.history):
            raise ProtocolError(
                f"open_stream: num_output_tokens is {start.num_output_tokens} but the history has {len(start.history)} tokens"
            )
        reader, markers = None, frozenset[str]()
        if start.reading is not None:
            start.reading.check()
            markers = start.reading.markers
            reader = StreamReader(start.reading, start.sent)
        self._forget(start.stream_id)
        self._over.pop(start.stream_id, None)
        matcher = StopMatcher(start.stops, include_stop=start.include_stop) if any(start.stops) else None
        decoder = IncrementalDecoder(self._tables.of(skip_special_tokens=start.skip_special_tokens, keep=markers))
        stream = self._streams[start.stream_id] = Stream(start.stream_id, owner, decoder, matcher, reader)
        if former is not None and former.owner == owner:
            # Begun again because of a gap: tokens already on their way show the same gap once more, which is no news.
            stream.gap_told_ns = former.gap_told_ns
        effects = BatchEffects()
        if stream.resume(start.history, num_output_tokens=start.num_output_tokens, num_sent_chars=start.num_sent_chars):
            self._to_send(stream, effects)
        for entry in self._pending.pop(start.stream_id):
            self._take(start.stream_id, entry, effects, now_ns=now_ns)
        return effects

    def refuse(self, stream_id: int, *, owner: int) -> None:
        """End a stream that was not opened with an error, which waits in the outbox."""
        self._forget(stream_id)
        stream = self._streams[stream_id] = Stream(stream_id, owner, IncrementalDecoder(self._table), None)
        stream.fail()
        self.outbox(owner).add(stream)

    def close(self, stream_ids: Sequence[int], *, owner: int) -> list[int]:
        """Forget a router's streams; give those that were open. Another router's and unknown ones are left alone."""
        closed = []
        for stream_id in stream_ids:
            stream = self._streams.get(stream_id)
            if stream is None:
                # The router gave it up before it was opened here, or after its end; what came early or is to come is of no use.
                self._pending.pop(stream_id)
                if stream_id not in self._over:
                    self._remember(stream_id, _Over(is_stopped=False, told_ns=None))
            elif stream.owner == owner:
                self._forget(stream_id)
                self._remember(stream_id, _Over(is_stopped=False, told_ns=None))
                closed.append(stream_id)
        return closed

    def close_owner(self, owner: int) -> list[int]:
        """Forget all streams of a router that is gone; give them."""
        closed = self.close([stream.stream_id for stream in self._streams.values() if stream.owner == owner], owner=owner)
        self._outboxes.pop(owner, None)
        return closed

    def apply(self, batch: Batch, *, source: int, now_ns: int) -> BatchEffects:
        """Take a batch of tokens from a scheduler. The batch has passed `check`."""
        effects = BatchEffects()
        token_ids = list(batch.token_ids)
        begin = 0
        for index, stream_id in enumerate(batch.stream_ids):
            end = begin + (batch.num_tokens[index] if batch.num_tokens else 1)
            entry = TokenEntry(
                batch.first_positions[index],
                token_ids[begin:end],
                batch.finish_reasons[index] if batch.finish_reasons else NOT_FINISHED,
                batch.num_stop_tokens[index] if batch.num_stop_tokens else 0,
                batch.num_cached_tokens[index] if batch.num_cached_tokens else 0,
                source,
                batch.told.get(stream_id) if batch.told else None,
            )
            self._take(stream_id, entry, effects, now_ns=now_ns)
            begin = end
        return effects

    def mark_sent(self, owner: int) -> list[int]:
        """Note that a router's queue took its deltas; give the streams that are over with them."""
        finished = self.outbox(owner).mark_sent()
        for stream in finished:
            del self._streams[stream.stream_id]
            if stream.stream_id not in self._over:
                self._remember(stream.stream_id, _Over(is_stopped=False, told_ns=None))
        return [stream.stream_id for stream in finished]

    def mark_unsent(self, owner: int) -> int:
        """Note that a router's queue is full; give how many of its streams were rewound for it."""
        return self.outbox(owner).mark_unsent(tokens_max=self._limits.unsent_tokens_max)

    def expire(self, *, now_ns: int) -> int:
        """Throw out tokens whose stream was never opened; give how many streams that were."""
        return self._pending.expire(now_ns=now_ns)

    def _take(self, stream_id: int, entry: TokenEntry, effects: BatchEffects, *, now_ns: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is None or stream.finish_reason != NOT_FINISHED:
            self._take_without_stream(stream_id, entry, effects, now_ns=now_ns)
            return
        if entry.num_cached_tokens:
            stream.num_cached_tokens = entry.num_cached_tokens
        outcome = stream.take(
            entry.position, entry.token_ids, entry.finish_reason, num_stop_tokens=entry.num_stop_tokens, told=entry.told
        )
        if outcome is Outcome.NOTHING_NEW:
            return
        if outcome is Outcome.GAP:
            self._take_gap(stream, effects, now_ns=now_ns)
            return
        if outcome is Outcome.STOPPED:
            effects.stops.setdefault(entry.source, []).append(stream_id)
            effects.num_stopped += 1
            self._remember(stream_id, _Over(is_stopped=True, told_ns=now_ns))
        self._to_send(stream, effects)

    def _take_without_stream(self, stream_id: int, entry: TokenEntry, effects: BatchEffects, *, now_ns: int) -> None:
        over = self._over.get(stream_id)
        if over is None:
            if stream_id not in self._streams:
                effects.num_evicted += self._pending.add(stream_id, entry, now_ns=now_ns)
            return
        if entry.finish_reason != NOT_FINISHED or not over.is_stopped:
            return
        # The scheduler did not hear the stop, or moved the sequence: tell it again, but not for every step it had planned.
        if over.told_ns is None or now_ns - over.told_ns >= self._limits.repeat_after_ns:
            over.told_ns = now_ns
            effects.stops.setdefault(entry.source, []).append(stream_id)

    def _take_gap(self, stream: Stream, effects: BatchEffects, *, now_ns: int) -> None:
        if stream.gap_told_ns is not None and now_ns - stream.gap_told_ns < self._limits.repeat_after_ns:
            return
        stream.gap_told_ns = now_ns
        effects.num_gaps += 1
        self.outbox(stream.owner).gaps[stream.stream_id] = stream.next_position
        effects.owners.add(stream.owner)

    def _to_send(self, stream: Stream, effects: BatchEffects) -> None:
        self.outbox(stream.owner).add(stream)
        effects.owners.add(stream.owner)

    def _forget(self, stream_id: int) -> None:
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            self.outbox(stream.owner).discard(stream_id)

    def _remember(self, stream_id: int, over: _Over) -> None:
        self._over[stream_id] = over
        while len(self._over) > self._limits.streams_max:
            self._over.popitem(last=False)
