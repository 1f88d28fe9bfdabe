"""The core of what embeds: texts that wait, and the lanes that make vectors of them. Pure; it holds no tokens that come back.

A text is computed whole in one step and is over with it. So there are no pages, no slots to free and nothing to plan but
which texts go together: the oldest first, as many as fit. What a lost lane had is computed again.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from headrace.errors import (
    DeadlineExceededError,
    HeadraceError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    RequestFailedError,
    UnavailableError,
)
from services.scheduler.admission import LANES_LOST_MAX
from services.scheduler.deadlines import Deadlines


@dataclass(frozen=True, slots=True)
class EmbedCapacity:
    """What a worker group offers; sizes in tokens. `vector_size` is the count of numbers in a vector."""

    model: str
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    vocab_size: int
    vector_size: int

    @property
    def max_text_tokens(self) -> int:
        """Longest text: one that fits a step alone."""
        return min(self.max_model_len, self.max_num_batched_tokens)


@dataclass(slots=True, eq=False)
class EmbedRequest:
    """One text. Its deadline and `queued_ns` are of the core's clock; `trace` is the shell's."""

    request_id: str
    owner: int
    model: str
    tokens: array[int]
    deadline_ns: int = 0
    trace: object = None
    queued_ns: int = 0
    num_lanes_lost: int = 0
    is_over: bool = False


@dataclass(slots=True, eq=False)
class EmbedLane:
    """One worker group, and the texts of the steps that are at it, by step."""

    lane_id: int
    capacity: EmbedCapacity
    in_flight: dict[int, list[EmbedRequest]] = field(default_factory=dict)
    is_draining: bool = False
    num_steps: int = 0


class Embeddings:
    """All texts of one scheduler process that are to be embedded.

    Args:
        max_waiting_requests: Most texts that wait.
        max_waiting_tokens: Most tokens of waiting texts together; a text that would wait alone is always taken.
        max_in_flight: Most steps at one lane.
        on_failed: Told each text that ends without its vector, and why.
    """

    def __init__(
        self,
        *,
        max_waiting_requests: int,
        max_waiting_tokens: int,
        max_in_flight: int,
        on_failed: Callable[[EmbedRequest, HeadraceError], None],
    ) -> None:
        self.lanes: dict[int, EmbedLane] = {}
        self.num_steps = 0
        self._max_requests = max_waiting_requests
        self._max_tokens = max_waiting_tokens
        self._max_in_flight = max_in_flight
        self._on_failed = on_failed
        self._requests: dict[str, EmbedRequest] = {}
        self._waiting: dict[str, OrderedDict[EmbedRequest, None]] = {}
        self._num_waiting_tokens = 0
        # By model, the longest text that a lane of it took; kept when the lane is lost, for its next life.
        self._max_text_tokens: dict[str, int] = {}
        self._deadlines = Deadlines()

    @property
    def num_requests(self) -> int:
        """Texts that have not ended."""
        return len(self._requests)

    @property
    def num_waiting(self) -> int:
        """Texts that are not at a lane."""
        return sum(len(queue) for queue in self._waiting.values())

    def submit(self, request: EmbedRequest, now_ns: int) -> None:
        """Take a text. One that is held already stays where it is: its router only asks again.

        Raises:
            UnavailableError: No lane that embeds has joined yet.
            NotFoundError: Its model is not one that embeds here.
            InvalidRequestError: It has no tokens, or more than any lane computes in a step.
            DeadlineExceededError: Its deadline is over.
            OverloadedError: A bound of the queue is reached.
        """
        held = self._requests.get(request.request_id)
        if held is not None and held.owner == request.owner:
            return
        self.abort([request.request_id])
        self._check(request, now_ns)
        request.queued_ns = now_ns
        self._requests[request.request_id] = request
        self._waiting.setdefault(request.model, OrderedDict())[request] = None
        self._num_waiting_tokens += len(request.tokens)
        if request.deadline_ns:
            self._deadlines.add(request.request_id, request.deadline_ns, self._requests, len(self._requests))

    def _check(self, request: EmbedRequest, now_ns: int) -> None:
        if not self._max_text_tokens:
            raise UnavailableError("scheduler: no worker that embeds has joined yet; retry later")
        longest = self._max_text_tokens.get(request.model)
        if longest is None:
            models = ", ".join(sorted(self._max_text_tokens))
            raise NotFoundError(f"scheduler: model {request.model!r} does not embed here, only {models}", param="model")
        num_tokens = len(request.tokens)
        if not 1 <= num_tokens <= longest:
            raise InvalidRequestError(
                f"input: a text has {num_tokens} tokens; 1 to {longest} are allowed by model {request.model!r}", param="input"
            )
        if 0 < request.deadline_ns <= now_ns:
            raise DeadlineExceededError("scheduler: the request's deadline had passed when it arrived")
        num_waiting = self.num_waiting
        if num_waiting >= self._max_requests:
            raise OverloadedError(
                f"scheduler: {num_waiting} texts wait and max_waiting_requests is {self._max_requests}; retry later"
            )
        if num_waiting and self._num_waiting_tokens + num_tokens > self._max_tokens:
            raise OverloadedError(
                f"scheduler: {self._num_waiting_tokens} tokens wait, this text has {num_tokens} and max_waiting_tokens is "
                f"{self._max_tokens}; retry later"
            )

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget texts, wherever they are; unknown ones are ignored."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self._forget(request)

    def abort_owner(self, owner: int) -> None:
        """A router is gone: forget all its texts."""
        self.abort([one.request_id for one in self._requests.values() if one.owner == owner])

    def expire(self, now_ns: int) -> None:
        """End the texts whose deadline has passed."""
        for request_id in self._deadlines.take_due(now_ns):
            request = self._requests.get(request_id)
            if request is not None and 0 < request.deadline_ns <= now_ns:
                held_s = (now_ns - request.queued_ns) / 1e9
                message = f"scheduler: the request's deadline passed after {held_s:.1f} s, with {self.num_waiting} texts waiting"
                self._fail(request, DeadlineExceededError(message))

    def next_deadline_ns(self) -> int | None:
        """When `expire` has to be called next, or None."""
        return self._deadlines.next_ns(self._requests)

    # Lanes and steps

    def lane_joined(self, lane_id: int, capacity: EmbedCapacity) -> EmbedLane:
        """A worker group joins."""
        self.lane_lost(lane_id)
        lane = self.lanes[lane_id] = EmbedLane(lane_id, capacity)
        others = [other.capacity.max_text_tokens for other in self.lanes.values() if other.capacity.model == capacity.model]
        self._max_text_tokens[capacity.model] = max(others)
        return lane

    def lane_lost(self, lane_id: int) -> None:
        """A worker group is gone: its texts wait again, in front of all others."""
        lane = self.lanes.pop(lane_id, None)
        if lane is None:
            return
        lost = [request for step in lane.in_flight.values() for request in step if not request.is_over]
        for request in reversed(lost):
            request.num_lanes_lost += 1
            if request.num_lanes_lost >= LANES_LOST_MAX:
                self._fail(request, RequestFailedError(f"scheduler: {LANES_LOST_MAX} workers ended while they had this text"))
                continue
            queue = self._waiting.setdefault(request.model, OrderedDict())
            queue[request] = None
            queue.move_to_end(request, last=False)
            self._num_waiting_tokens += len(request.tokens)

    def plan(self, lane: EmbedLane) -> tuple[int, list[EmbedRequest]] | None:
        """The next step of a lane: its number and its texts, the oldest that fit together; None when there is none now."""
        queue = self._waiting.get(lane.capacity.model)
        if not queue or lane.is_draining or len(lane.in_flight) >= self._max_in_flight:
            return None
        texts = list(_fitting(queue, lane.capacity))
        if not texts:
            return None
        for request in texts:
            self._leave_queue(request)
        lane.num_steps += 1
        self.num_steps += 1
        lane.in_flight[lane.num_steps] = texts
        return lane.num_steps, texts

    def finish(self, lane: EmbedLane, step_id: int, slots: Iterable[int], failed: dict[int, str]) -> list[tuple[EmbedRequest, int]]:
        """A step is over.

        Args:
            lane: Where.
            step_id: Which.
            slots: Places, in the step, of the texts that have vectors.
            failed: Places of those that failed, and why.

        Returns:
            Texts that are still wanted, each with the place of its vector among `slots`. They have ended.
        """
        texts = lane.in_flight.pop(step_id, [])
        done: list[tuple[EmbedRequest, int]] = []
        for place, slot in enumerate(slots):
            if slot < len(texts) and not texts[slot].is_over:
                self._forget(texts[slot])
                done.append((texts[slot], place))
        for slot, request in enumerate(texts):
            if not request.is_over:
                self._fail(
                    request, RequestFailedError(f"the worker could not embed a text: {failed.get(slot, 'it gave no vector')}")
                )
        return done

    def _fail(self, request: EmbedRequest, error: HeadraceError) -> None:
        self._forget(request)
        self._on_failed(request, error)

    def _forget(self, request: EmbedRequest) -> None:
        request.is_over = True
        del self._requests[request.request_id]
        self._leave_queue(request)

    def _leave_queue(self, request: EmbedRequest) -> None:
        queue = self._waiting.get(request.model)
        if queue is not None and request in queue:
            del queue[request]
            self._num_waiting_tokens -= len(request.tokens)


def _fitting(queue: Iterable[EmbedRequest], capacity: EmbedCapacity) -> Iterator[EmbedRequest]:
    """The oldest texts that fit a step together. Those that are too long for the lane wait for another."""
    num_tokens = num_texts = 0
    for request in queue:
        if len(request.tokens) > capacity.max_text_tokens:
            continue
        num_tokens += len(request.tokens)
        num_texts += 1
        if num_tokens > capacity.max_num_batched_tokens or num_texts > capacity.max_num_seqs:
            return
        yield request
