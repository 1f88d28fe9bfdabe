"""What waits to be sent to one router: the streams with unsent text, and gaps to report.

Normally empty between batches. While a router's queue is full the text of each stream grows together here; a stream that reaches
its bound is rewound and reported as a gap, so that one router that does not read costs a bounded amount of memory and no one
else's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.v1.common_pb2 import FinishReason
from services.detokenizer.logprobs import Told
from services.detokenizer.parsers.reading import CallPart
from services.detokenizer.stream import NOT_FINISHED, Stream
from services.detokenizer.stream_reader import Unsent

_NOTHING_READ = Unsent()


@dataclass(slots=True)
class DeltaArrays:
    """The fields of an OutputDeltas message, one entry a stream; arrays that say nothing are empty."""

    stream_ids: list[int]
    first_positions: list[int]
    num_tokens: list[int]
    token_ids: list[int]
    texts: list[str]
    finish_reasons: list[FinishReason]
    num_cached_tokens: list[int]
    told: dict[int, Told]
    """Logprobs, by the stream's place."""
    readings: ReadArrays | None = None


@dataclass(slots=True)
class ReadArrays:
    """What was read of the text beside text, one entry a stream; `calls` are parts of calls, flat."""

    reasonings: list[str]
    num_reasoning_tokens: list[int]
    is_budget_spent: list[bool]
    num_call_parts: list[int]
    calls: list[CallPart]


def _read_arrays(streams: Sequence[Stream]) -> ReadArrays:
    unsent = [stream.reader.unsent if stream.reader is not None else _NOTHING_READ for stream in streams]
    return ReadArrays(
        reasonings=["".join(read.reasonings) for read in unsent],
        num_reasoning_tokens=[stream.reader.num_reasoning_tokens if stream.reader is not None else 0 for stream in streams],
        is_budget_spent=[stream.is_budget_spent for stream in streams],
        num_call_parts=[len(read.calls) for read in unsent],
        calls=[part for read in unsent for part in read.calls],
    )


class Outbox:
    """Unsent work for one router."""

    def __init__(self) -> None:
        self._streams: dict[int, Stream] = {}
        self.gaps: dict[int, int] = {}
        """First missing output position by stream id, for each gap to report."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not self._streams and not self.gaps

    def __len__(self) -> int:
        """Streams with something unsent."""
        return len(self._streams)

    def add(self, stream: Stream) -> None:
        """Note that a stream has something unsent."""
        self._streams[stream.stream_id] = stream

    def discard(self, stream_id: int) -> None:
        """Forget a stream."""
        self._streams.pop(stream_id, None)
        self.gaps.pop(stream_id, None)

    def deltas(self) -> DeltaArrays | None:
        """Give all that is unsent as one message; None when nothing is. Nothing is forgotten before `mark_sent`."""
        if not self._streams:
            return None
        streams = self._streams.values()
        arrays = DeltaArrays(
            stream_ids=list(self._streams),
            first_positions=[stream.unsent_position for stream in streams],
            num_tokens=[len(stream.unsent_token_ids) for stream in streams],
            token_ids=[token_id for stream in streams for token_id in stream.unsent_token_ids],
            texts=["".join(stream.unsent_texts) for stream in streams],
            finish_reasons=[stream.finish_reason for stream in streams],
            num_cached_tokens=[stream.num_cached_tokens for stream in streams],
            told={place: stream.told for place, stream in enumerate(streams) if stream.told is not None},
        )
        # The contract leaves out arrays that say nothing.
        if not any(arrays.finish_reasons):
            arrays.finish_reasons = []
        if not any(arrays.num_cached_tokens):
            arrays.num_cached_tokens = []
        if arrays.num_tokens.count(1) == len(arrays.num_tokens):
            arrays.num_tokens = []
        if any(stream.reader is not None for stream in streams):
            arrays.readings = _read_arrays(list(streams))
        return arrays

    def mark_sent(self) -> list[Stream]:
        """Forget the unsent work; give the streams that are over with it."""
        finished = []
        for stream in self._streams.values():
            stream.mark_sent()
            if stream.finish_reason != NOT_FINISHED:
                finished.append(stream)
        self._streams.clear()
        return finished

    def mark_unsent(self, *, tokens_max: int) -> int:
        """Note that the router's queue is full.

        Every unfinished stream that gathered more than `tokens_max` tokens since then is rewound, and its gap noted.

        Returns:
            How many were rewound.
        """
        num_rewound = 0
        for stream in self._streams.values():
            if stream.mark_unsent() > tokens_max and stream.finish_reason == NOT_FINISHED:
                stream.rewind()
                self.gaps[stream.stream_id] = stream.next_position
                num_rewound += 1
        return num_rewound
