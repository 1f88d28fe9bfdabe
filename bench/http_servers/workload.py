"""What both candidate applications share: the texts they exchange, the pushed streams and the notes they keep for the client.

The hot paths (one JSON answer, one streamed chunk) are written out in each application, so that no layer of ours stands
between the server under test and the figure. Everything here happens once a stream, once a round, or on request.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import orjson
import psutil

ANSWER_BYTES = 300
CHUNK_BYTES = 200
BODY_LIMIT_BYTES = 1 << 20
FLOOD_CHUNK = b"data: " + b"x" * 4088 + b"\n\n"
FLOOD_CHUNKS_MAX = 16384
SLOW_CHUNKS = 15

SSE_HEADERS = {"content-type": "text/event-stream", "cache-control": "no-cache"}
TOO_LARGE = orjson.dumps({"error": {"message": "the body is over 1048576 bytes", "code": "request_too_large"}})


def json_answer(body: bytes) -> bytes:
    """Parse the small JSON body and answer with `ANSWER_BYTES` bytes, as a short completion would."""
    request = orjson.loads(body)
    answer = orjson.dumps({"id": "cmpl-1", "model": request["model"], "text": ""})
    return answer[:-2] + b"y" * (ANSWER_BYTES - len(answer)) + answer[-2:]


def sse_chunk(now_ns: int) -> bytes:
    """One event of `CHUNK_BYTES` bytes; its first field is when it was put on the stream's queue."""
    head = b'data: {"t":%d,"choices":[{"delta":{"content":"' % now_ns
    tail = b'"}}]}\n\n'
    return head + b"z" * (CHUNK_BYTES - len(head) - len(tail)) + tail


@dataclass(frozen=True)
class StreamSpec:
    """One streaming run: wait until `num_streams` are open, then push `num_rounds` chunks to each.

    With `interval_us` 0 a round is pushed as soon as every stream has taken the one before it.
    """

    num_streams: int
    num_rounds: int
    interval_us: int

    @classmethod
    def from_query(cls, query: bytes) -> StreamSpec:
        """Read the three numbers from a query string."""
        fields = parse_qs(query.decode())
        return cls(
            num_streams=int(fields["streams"][0]), num_rounds=int(fields["rounds"][0]), interval_us=int(fields["interval_us"][0])
        )


class StreamSource:
    """Pushes chunks to all open streams through one queue each, as the router does when a batch of deltas arrives."""

    def __init__(self) -> None:
        self.report: dict[str, int] = {}
        self._queues: list[asyncio.Queue[bytes | None]] = []
        self._push: asyncio.Task[None] | None = None

    def open(self, spec: StreamSpec) -> asyncio.Queue[bytes | None]:
        """Join the run; the last stream to join starts the pushing. `None` on the queue is the end of the stream."""
        # One place a queue: the pusher then waits for its readers, and each chunk wakes its reader once, as in the router.
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1 if spec.interval_us == 0 else 1024)
        self._queues.append(queue)
        if len(self._queues) == spec.num_streams:
            queues, self._queues = self._queues, []
            self._push = asyncio.create_task(self._push_rounds(queues, spec))
        return queue

    async def _push_rounds(self, queues: list[asyncio.Queue[bytes | None]], spec: StreamSpec) -> None:
        self.report = {}
        wall_start, cpu_start = time.monotonic_ns(), time.process_time_ns()
        for round_index in range(spec.num_rounds):
            if spec.interval_us:
                due = wall_start + round_index * spec.interval_us * 1000
                await asyncio.sleep(max(0.0, (due - time.monotonic_ns()) / 1e9))
            chunk = sse_chunk(time.monotonic_ns())
            for queue in queues:
                await queue.put(chunk)
        for queue in queues:
            await queue.put(None)
        self.report = {
            "num_chunks": spec.num_rounds * len(queues),
            "wall_ns": time.monotonic_ns() - wall_start,
            "cpu_ns": time.process_time_ns() - cpu_start,
        }


@dataclass
class Observations:
    """What the application saw of misbehaving clients; read by the client at `/stats`."""

    disconnects_ns: list[int] = field(default_factory=list)
    flood_bytes: int = 0
    flood_progress_ns: int = 0
    flood_ended_by: str = ""
    body_bytes: int = 0

    def note_disconnect(self) -> None:
        """Record when the application learned that the client of a held stream is gone."""
        self.disconnects_ns.append(time.monotonic_ns())

    def note_flood(self) -> None:
        """Record that the server took one more chunk for a client that does not read."""
        self.flood_bytes += len(FLOOD_CHUNK)
        self.flood_progress_ns = time.monotonic_ns()

    def stats(self, source: StreamSource) -> bytes:
        """All notes, this process's CPU time (every thread) and its memory, as JSON."""
        record: dict[str, Any] = {
            "now_ns": time.monotonic_ns(),
            "cpu_ns": time.process_time_ns(),
            "rss_bytes": psutil.Process().memory_info().rss,
            "stream": source.report,
            "disconnects_ns": self.disconnects_ns,
            "flood_bytes": self.flood_bytes,
            "flood_progress_ns": self.flood_progress_ns,
            "flood_ended_by": self.flood_ended_by,
            "body_bytes": self.body_bytes,
        }
        return orjson.dumps(record)
