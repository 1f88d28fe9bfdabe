"""The scheduler's core: takes events and a time, gives plans and outcomes.

It owns the requests, the waiting queue and the lanes, and says what happens to each request from its submission to its one end.
It does no I/O, reads no clock and knows nothing of text: the service, the property tests and the simulator drive the same class.

`now_ns` is a monotonic clock in nanoseconds throughout, deadlines included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from headrace.errors import (
    DeadlineExceededError,
    HeadraceError,
    ReplicaDeadError,
)
from services.scheduler.admission import (
    check_deadline,
    check_drafts,
    check_lane,
    check_request,
    check_size,
    check_still_possible,
    count_lost_lane,
)
from services.scheduler.counts import Counts
from services.scheduler.deadlines import BestSpeed, Deadlines
from services.scheduler.entrance import Entrance
from services.scheduler.lane import Lane, LaneCapacity, StepRules
from services.scheduler.lane_group import LaneGroups
from services.scheduler.lanes import Lanes
from services.scheduler.outbox import Outbox, Target
from services.scheduler.output_lengths import LengthEstimate, OutputLengths
from services.scheduler.prefill_delayer import DelayerLimits
from services.scheduler.radix_tree import Eviction
from services.scheduler.sequence import FinishReason, Sequence, Status
from services.scheduler.step_plan import StepPlan, StepResult
from services.scheduler.step_results import apply_result
from services.scheduler.token_fanout import StreamBatch
from services.scheduler.waiting_queue import WaitingQueue


@dataclass(frozen=True, slots=True)
class Ending:
    """A sequence has ended.

    Attributes:
        sequence: Which; it is forgotten here. Its `finish_reason` says how.
        error: What its router must be told; None when it got its output, or had asked for the end itself.
    """

    sequence: Sequence
    error: HeadraceError | None = None


@dataclass(slots=True)
class Outcome:
    """What has come out of the core since it was last asked.

    Attributes:
        batches: Tokens to send.
        endings: Sequences that ended.
        behind: Targets that have output to be sent again.
    """

    batches: list[StreamBatch] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    behind: list[Target] = field(default_factory=list)


class Scheduler:
    """All requests of one scheduler process.

    Args:
        lanes: The worker groups.
        queue: Sequences that wait.
        outbox: Where tokens go.
        eviction: Which cached prefixes go first; None to keep none.
        rules: How steps are planned; None for the usual.
        preemption_threshold: How far below a waiting sequence's priority a running one must be to make room for it; None for never.
        lengths: What outputs are expected to need; None for what is measured.
        delayer_limits: How long new prefills may be put off on lanes that step together; None for the usual.

    Attributes:
        queue: Sequences that wait.
        lanes: The worker groups.
        groups: Those of them that step together.
        outbox: Where tokens go.
        counts: Running totals for metrics.
        model: Name of the model the lanes hold, also while there is none; empty before the first has joined.
        vocab_size: The model's; token ids are below it.
    """

    def __init__(
        self,
        lanes: Lanes,
        queue: WaitingQueue,
        outbox: Outbox,
        eviction: Eviction | None = "lru",
        *,
        rules: StepRules | None = None,
        preemption_threshold: int | None = None,
        lengths: LengthEstimate | None = None,
        delayer_limits: DelayerLimits | None = None,
    ) -> None:
        self.lanes = lanes
        self.queue = queue
        self.outbox = outbox
        self.counts = Counts()
        self.model = ""
        self.vocab_size = 0
        self._max_prompt_tokens = 0
        self._max_num_drafts = 0
        self._eviction: Eviction | None = eviction
        self._rules = rules or StepRules()
        self._lengths = lengths or OutputLengths()
        self._entrance = Entrance(lanes, queue, self._lengths, self.counts, preemption_threshold=preemption_threshold)
        self._num_lanes_joined = 0
        self.groups = LaneGroups(delayer_limits or DelayerLimits(), self._entrance.take_back)
        self._requests: dict[str, Sequence] = {}
        self._streams: dict[int, Sequence] = {}
        self._deadlines = Deadlines()
        self._speed = BestSpeed()
        self._outcome = Outcome()

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def take_outcome(self) -> Outcome:
        """What has come out since the last call."""
        outcome, self._outcome = self._outcome, Outcome()
        return outcome

    # Requests

    def submit(self, sequence: Sequence, now_ns: int) -> None:
        """Take a new sequence. One of the same request id, left from before a router lost sight of it, is replaced.

        Raises:
            InvalidRequestError: It can never fit, or wants drafts that no lane verifies; the message has the numbers.
            NotFoundError: Its model is not here.
            UnavailableError: No lane has joined yet.
            OverloadedError: A bound of the waiting queue is reached.
            DeadlineExceededError: Its deadline is over.
        """
        self.abort([sequence.request_id], now_ns)
        check_request(sequence, self.model, now_ns)
        sequence.queued_ns = now_ns
        if sequence.num_output_tokens and self._is_complete(sequence):
            self._finish_complete(sequence, now_ns)
            return
        check_size(sequence, self._max_prompt_tokens)
        check_drafts(sequence, self._max_num_drafts)
        self.queue.check_room(sequence.num_tokens, now_ns)
        self._requests[sequence.request_id] = sequence
        self._streams[sequence.stream_id] = sequence
        self.outbox.attach(sequence)
        if sequence.deadline_ns:
            self._deadlines.add(sequence.request_id, sequence.deadline_ns, self._requests, len(self._requests))
        self.queue.add(sequence)
        self._admit(now_ns)

    def abort(self, request_ids: Iterable[str], now_ns: int) -> None:
        """Free requests wherever they are; unknown ones are ignored."""
        for request_id in request_ids:
            self.outbox.drop_kept(request_id)
            sequence = self._requests.get(request_id)
            if sequence is not None:
                self._end(sequence, FinishReason.ABORT, now_ns)

    def abort_owner(self, owner: int, now_ns: int) -> None:
        """A router is gone: free all its requests."""
        self.abort([s.request_id for s in self._requests.values() if s.owner == owner], now_ns)
        self.outbox.drop_owner(owner)

    def stop_streams(self, stream_ids: Iterable[int], now_ns: int) -> None:
        """Stop strings were found in the text of these streams; the detokenizer has told the router."""
        for stream_id in stream_ids:
            sequence = self._streams.get(stream_id)
            if sequence is not None:
                self._end(sequence, FinishReason.STOP, now_ns)

    def redirect(self, request_id: str, target: Target, *, from_position: int, now_ns: int) -> None:
        """Send a request's tokens to another detokenizer, those from `from_position` on once more.

        Raises:
            ReplicaDeadError: The request is not held here any more, or its router has got further than we; it has to be submitted
            again.
        """
        sequence = self._requests.get(request_id) or self.outbox.kept(request_id)
        if sequence is None:
            raise ReplicaDeadError("scheduler: the request is not held here any more; submit it again")
        if from_position > sequence.num_output_tokens:
            self.abort([request_id], now_ns)
            raise ReplicaDeadError(
                f"scheduler: output position {from_position} was asked for and the request has {sequence.num_output_tokens} output "
                "tokens here; submit it again"
            )
        self.outbox.redirect(sequence, target, from_position)
        if sequence.lane is not None:
            sequence.lane.version += 1
        if target.behind:
            self._outcome.behind.append(target)

    def expire(self, now_ns: int) -> None:
        """End the requests whose deadline has passed, waiting or running, and give up output that could not be sent for long."""
        for request_id in self._deadlines.take_due(now_ns):
            sequence = self._requests.get(request_id)
            # A request submitted again under its id has another deadline.
            if sequence is not None and 0 < sequence.deadline_ns <= now_ns:
                error = DeadlineExceededError(_deadline_message(sequence, now_ns, len(self.queue)))
                self._end(sequence, FinishReason.ERROR, now_ns, error)
        self.outbox.drop_lingering(now_ns)

    def next_deadline_ns(self) -> int | None:
        """When `expire` has to be called next for a deadline, or None."""
        return self._deadlines.next_ns(self._requests)

    # Lanes and steps

    def lane_joined(self, lane_id: int, capacity: LaneCapacity, now_ns: int) -> Lane:
        """A worker group joins; waiting sequences may enter it at once.

        Raises:
            InvalidRequestError: It holds another model than the lanes that are here, and is not enrolled.
        """
        check_lane(capacity.model, self.lanes, self.model)
        self.lane_lost(lane_id, now_ns)
        lane = Lane(lane_id, capacity, self._eviction, self._rules)
        # A worker that comes back in the same life must see no step id twice.
        self._num_lanes_joined += 1
        lane.last_step_id = self._num_lanes_joined << 32
        self.lanes.add(lane)
        self.groups.add(lane)
        self._entrance.touch(lane)
        self.model, self.vocab_size = capacity.model, capacity.vocab_size
        self._max_prompt_tokens, self._max_num_drafts = self.lanes.largest_prompt(), self.lanes.most_drafts()
        self._admit(now_ns)
        return lane

    def lane_lost(self, lane_id: int, now_ns: int) -> None:
        """A worker group is gone: its sequences, with all tokens so far, wait in front of all others for another lane.

        One that has lost too many, and may be what ends them, ends.
        """
        lane = self.lanes.remove(lane_id)
        if lane is None:
            return
        self.groups.remove(lane)
        for sequence in list(lane.running()):
            try:
                count_lost_lane(sequence)
            except HeadraceError as error:
                self._end(sequence, FinishReason.ERROR, now_ns, error)
        self._requeue(list(lane.running()))
        self._entrance.forget(lane)
        if len(self.lanes):
            self._max_prompt_tokens, self._max_num_drafts = self.lanes.largest_prompt(), self.lanes.most_drafts()
        self._admit(now_ns)

    def plan(self, lane: Lane, now_ns: int) -> StepPlan | None:
        """The lane's next step, or None when one is at the worker or there is nothing to tell it."""
        self._entrance.touch(lane)
        self._admit(now_ns)
        plan = self.groups.plan(lane, now_ns)
        if plan is None:
            return None
        if plan.preempted:
            self._entrance.touch(lane)
            self._admit(now_ns)
        self.counts.num_scheduled_tokens += plan.num_tokens
        return plan

    def step_result(self, lane: Lane, result: StepResult, now_ns: int) -> bool:
        """Apply a step's result. Returns False when the lane waits for no such step: it is counted and ignored."""
        step = apply_result(lane, result)
        if step is None:
            # Only freed slots were planned: some workers answer that, too.
            if result.slots or result.failed_slots or result.unknown_slots:
                self.counts.num_ignored_results += 1
            return False
        self._speed.record(step.num_tokens, result.duration_ns)
        self.counts.num_steps += 1
        self.counts.num_ignored_rows += step.num_ignored_rows
        if step.num_limited_tokens:
            self.counts.num_limited_steps += 1
            self.counts.num_limited_tokens += step.num_limited_tokens
        self.counts.num_output_tokens += sum(len(batch.token_ids) for batch in step.batches)
        self._outcome.batches += step.batches
        for sequence in step.finished:
            self._lengths.record(sequence.num_output_tokens)
            self._end(sequence, sequence.finish_reason, now_ns)
        for sequence, error in step.failed:
            self._end(sequence, FinishReason.ERROR, now_ns, error)
        self._requeue(step.lost)
        return True

    # Inside

    def _is_complete(self, sequence: Sequence) -> bool:
        """Whether nothing is left to generate: a former life had its last token, or no lane can hold one more."""
        return sequence.num_tokens >= sequence.token_limit(self._max_prompt_tokens + 1)

    def _finish_complete(self, sequence: Sequence, now_ns: int) -> None:
        """End a sequence that has all its output already: only the finish is to be told."""
        sequence.finish_reason = FinishReason.LENGTH
        sequence.has_final_output = True
        sequence.status = Status.FINISHED
        sequence.finished_ns = now_ns
        batch = StreamBatch(sequence.target, [sequence], [sequence.stream_id], [sequence.num_output_tokens], [], num_tokens=[0])
        batch.mark_finished()
        self._outcome.batches.append(batch)
        self._outcome.endings.append(Ending(sequence))

    def _admit(self, now_ns: int) -> None:
        """Let waiting sequences enter lanes, in order, as long as the next one can."""
        while (sequence := self._entrance.next()) is not None:
            if sequence.num_output_tokens and sequence.model == self.model and self._is_complete(sequence):
                sequence.finish_reason = FinishReason.LENGTH
                self._forget(sequence, FinishReason.LENGTH, now_ns)
                self._finish_complete(sequence, now_ns)
                continue
            try:
                check_still_possible(sequence, self.model, self._max_prompt_tokens)
                check_deadline(sequence, self._speed, self.lanes, now_ns)
            except HeadraceError as error:
                self._end(sequence, FinishReason.ERROR, now_ns, error)
                continue
            if not self._entrance.admit(sequence, now_ns):
                return

    def _requeue(self, sequences: list[Sequence]) -> None:
        """Running sequences, oldest first, have lost their place and wait in front of all others."""
        for sequence in reversed(sequences):
            assert sequence.lane is not None
            self._entrance.touch(sequence.lane)
            sequence.lane.release(sequence)
            sequence.status = Status.WAITING
            self.queue.take_back(sequence)
        self.counts.num_requeued += len(sequences)

    def _end(self, sequence: Sequence, reason: FinishReason, now_ns: int, error: HeadraceError | None = None) -> None:
        self._forget(sequence, reason, now_ns)
        self._outcome.endings.append(Ending(sequence, error))

    def _forget(self, sequence: Sequence, reason: FinishReason, now_ns: int) -> None:
        """Take a live sequence out of everything it is in."""
        if sequence.lane is not None:
            self._entrance.touch(sequence.lane)
            sequence.lane.release(sequence)
        else:
            self.queue.remove(sequence, now_ns)
        del self._requests[sequence.request_id]
        if self._streams.get(sequence.stream_id) is sequence:
            del self._streams[sequence.stream_id]
        sequence.status = Status.FINISHED
        # Set before by the results, where its last tokens still have to be sent.
        sequence.has_final_output = sequence.finish_reason is not FinishReason.NONE
        sequence.finish_reason = reason
        sequence.finished_ns = now_ns
        if sequence.has_final_output:
            self.outbox.finish(sequence)
        else:
            self.outbox.detach(sequence)


def _deadline_message(sequence: Sequence, now_ns: int, num_waiting: int) -> str:
    held_s = (now_ns - sequence.queued_ns) / 1e9
    if sequence.lane is None and not sequence.num_output_tokens:
        return f"scheduler: the request's deadline passed after {held_s:.1f} s in the waiting queue of {num_waiting} requests"
    return f"scheduler: the request's deadline passed after {held_s:.1f} s, with {sequence.num_output_tokens} output tokens made"
