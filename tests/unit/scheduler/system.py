"""A scheduler with fake workers, detokenizers and a router's bookkeeping, driven step by step; checks every rule as it goes."""

from __future__ import annotations

from array import array
from collections import Counter, deque
from dataclasses import dataclass, field, replace

from services.scheduler.lane import Lane, LaneCapacity
from services.scheduler.outbox import Target
from services.scheduler.radix_tree import Node, RadixTree
from services.scheduler.scheduler import Scheduler
from services.scheduler.sequence import FinishReason, Sequence, Status
from services.scheduler.step_plan import StepPlan, StepResult
from services.scheduler.token_fanout import StreamBatch
from tests.unit.scheduler.fake_worker import FakeWorker


def pages_above(node: Node | None) -> list[int]:
    """Pages from the root down to a node."""
    pages: list[int] = []
    while node is not None:
        pages = node.pages + pages
        node = node.parent
    return pages


def check_tree(tree: RadixTree, locked: list[Node]) -> list[int]:
    """Assert that a tree's own accounts are right, given the nodes that are locked. Returns its pages."""
    locks: Counter[Node] = Counter()
    for node in locked:
        above: Node | None = node
        while above is not None:
            locks[above] += 1
            above = above.parent
    pages = []
    num_evictable = 0
    for node in tree.nodes():
        pages += node.pages
        assert node.num_locks == locks[node]
        assert node.pages and len(node.tokens) == len(node.pages) * tree.page_size * 4
        assert node.parent is not None
        assert node.parent.children[node.tokens[: tree.page_size * 4]] is node
        num_evictable += 0 if node.num_locks else len(node.pages)
    assert tree.num_pages == len(pages)
    assert tree.num_evictable == num_evictable
    return pages


def _check_goes_on(lane: Lane, plan: StepPlan, prompts: list[Sequence]) -> None:
    """Assert that, where prompts are left after a plan, it went on with them by all it had room for, or beside decodes by a page.

    Args:
        lane: Whose plan.
        plan: The plan.
        prompts: What was being prefilled before it. Who takes the room of a preempted one comes to the lane after the plan.
    """
    step, capacity = lane.in_flight[plan.step_id], lane.capacity
    left = [sequence for sequence in prompts if sequence in lane.prefilling and sequence not in plan.preempted]
    # A group may put new prompts off; little is computed at a time of those whose logprobs are wanted.
    if not left or capacity.group or any(sequence.wants_prompt_logprobs for sequence in lane.prefilling):
        return
    assert step.share is not None
    room = capacity.max_num_batched_tokens - step.share.num_decodes
    if not step.share.is_limited:
        assert step.share.num_tokens == room
    else:
        assert step.share.num_decodes
        assert min(capacity.page_size, room) <= step.share.num_tokens < room


@dataclass
class Stream:
    """What the other end has of one stream."""

    sequence: Sequence
    tokens: array[int]
    num_former: int
    finish: FinishReason | None = None
    num_ends: int = 0
    error_code: str | None = None
    error_message: str = ""


@dataclass
class Site:
    """A lane and its worker."""

    lane: Lane
    worker: FakeWorker
    results: deque[StepResult] = field(default_factory=deque)
    plans: list[StepPlan] = field(default_factory=list)


class System:
    """The whole, without processes.

    Attributes:
        core: The scheduler under test.
        now_ns: The clock.
        sites: Lanes by id.
        streams: By stream id; only of requests that were taken.
        deaf: Addresses to which nothing can be sent at present.
    """

    def __init__(self, core: Scheduler) -> None:
        self.core = core
        self.now_ns = 1_000_000_000
        self.sites: dict[int, Site] = {}
        self.streams: dict[int, Stream] = {}
        self.deaf: set[str] = set()
        self._last_lane_id = 0

    def join(self, capacity: LaneCapacity) -> Site:
        """A worker joins."""
        self._last_lane_id += 1
        lane = self.core.lane_joined(self._last_lane_id, capacity, self.now_ns)
        site = self.sites[lane.lane_id] = Site(lane, FakeWorker(capacity))
        self.collect()
        return site

    def lose(self, lane_id: int) -> None:
        """A worker dies."""
        del self.sites[lane_id]
        self.core.lane_lost(lane_id, self.now_ns)
        self.collect()

    def submit(self, sequence: Sequence) -> None:
        """A router submits; a refusal is raised."""
        former = sequence.output_from(0)
        stream = Stream(sequence, former, len(former))
        self.streams[sequence.stream_id] = stream
        try:
            self.core.submit(sequence, self.now_ns)
        except Exception:
            del self.streams[sequence.stream_id]
            raise
        self.collect()

    def plan_all(self) -> bool:
        """Every lane plans what it can. Returns whether any did."""
        num_plans = sum(len(site.plans) for site in self.sites.values())
        for site in self.sites.values():
            if not site.lane.capacity.group and len(site.lane.in_flight) < site.lane.max_in_flight:
                self._plan(site)
        # A lane of a group that asks for a plan may have some made for others.
        together = [site for site in self.sites.values() if site.lane.capacity.group]
        while any(self._plan(site) for site in together) or any(
            self.core.groups.has_plans(site.lane.capacity.group) for site in together
        ):
            pass
        self.collect()
        return sum(len(site.plans) for site in self.sites.values()) > num_plans

    def _plan(self, site: Site) -> bool:
        lane = site.lane
        num_plans = len(site.plans)
        prompts = list(lane.prefilling)
        while (plan := self.core.plan(lane, self.now_ns)) is not None:
            site.plans.append(plan)
            result = site.worker.apply(plan)
            if result is not None:
                site.results.append(result)
                _check_goes_on(lane, plan, prompts)
            prompts = list(lane.prefilling)
            if len(lane.in_flight) >= lane.max_in_flight and not lane.capacity.group:
                break
        return len(site.plans) > num_plans

    def deliver_result(self, site: Site, *, duration_ns: int = 0) -> None:
        """A worker's oldest answer arrives; it took that long, 0 for not known."""
        if site.results:
            result = replace(site.results.popleft(), duration_ns=duration_ns)
            assert self.core.step_result(site.lane, result, self.now_ns)
            site.worker.check_agrees_with(site.lane)
            self.collect()

    def run(self, *, max_steps: int = 10_000) -> int:
        """Go on until nothing is left to do. Returns the steps it took."""
        for num_steps in range(max_steps):
            self.now_ns += 1_000_000
            for site in list(self.sites.values()):
                self.deliver_result(site)
            if not self.plan_all() and not any(site.results for site in self.sites.values()):
                return num_steps
        raise AssertionError(f"work is left after {max_steps} steps")

    def collect(self) -> None:
        """Carry what has come out to where it goes."""
        outcome = self.core.take_outcome()
        for batch in outcome.batches:
            if batch.target.behind or not self._receive(batch):
                self.core.outbox.hold(batch)
                self.flush(batch.target)
        for target in outcome.behind:
            self.flush(target)
        for ending in outcome.endings:
            stream = self.streams[ending.sequence.stream_id]
            if stream.sequence is ending.sequence:
                stream.num_ends += 1
                if ending.error is not None:
                    stream.error_code, stream.error_message = ending.error.code, ending.error.message
            assert ending.sequence.status is Status.FINISHED
            assert ending.sequence.lane is None
            assert ending.sequence.finish_reason is not FinishReason.NONE

    def flush(self, target: Target) -> None:
        """Try again to send what a target has not got."""
        rest = target.rest()
        if rest is not None and self._receive(rest):
            self.core.outbox.sent(target)

    def check_accounting(self) -> None:
        """Pages, slots and sequences are each in exactly one place."""
        num_running = 0
        for site in self.sites.values():
            lane = site.lane
            running = list(lane.running())
            num_running += len(running)
            own = [page for sequence in running for page in sequence.pages[sequence.num_shared_pages :]]
            cached = check_tree(lane.kv.tree, [sequence.prefix for sequence in running if sequence.prefix is not None])
            pages = own + cached
            assert len(pages) == len(set(pages)) == lane.kv.pool.num_used
            assert lane.kv.pool.num_free + lane.kv.pool.num_used == lane.kv.pool.num_pages
            for sequence in running:
                assert pages_above(sequence.prefix)[: sequence.num_shared_pages] == sequence.pages[: sequence.num_shared_pages]
            slots = [sequence.slot for sequence in running]
            assert len(slots) == len(set(slots)) == lane.slots.num_slots - lane.slots.num_free
            assert lane.num_tokens == sum(sequence.num_tokens for sequence in running)
            assert lane.num_backlog_tokens == sum(s.num_tokens - s.num_scheduled for s in lane.prefilling)
            for sequence in running:
                assert sequence.status is Status.RUNNING
                assert sequence.lane is lane
                assert len(sequence.pages) * lane.kv.pool.page_size >= sequence.num_tokens - 1
            decoding = set(running) - set(lane.prefilling)
            for due in (lane.clock._page_due, lane.clock._limit_due):
                assert {sequence for sequences in due.values() for sequence in sequences} <= decoding
            if not lane.in_flight:
                for sequence in lane.decoding:
                    assert lane.clock.num_scheduled(sequence) == lane.clock.num_computed(sequence) == sequence.num_tokens - 1
                for sequence in lane.prefilling:
                    assert sequence.num_scheduled == sequence.num_computed
        waiting = list(self.core.queue)
        assert all(sequence.status is Status.WAITING and sequence.lane is None for sequence in waiting)
        assert self.core.queue.num_tokens == sum(sequence.num_tokens for sequence in waiting)
        assert len(waiting) + num_running == self.core.num_requests

    def _receive(self, batch: StreamBatch) -> bool:
        if batch.target.address in self.deaf:
            return False
        assert len(batch.stream_ids) == len(batch.first_positions) == len(batch.sequences)
        counts = batch.num_tokens or [1] * len(batch.stream_ids)
        finishes = batch.finish_reasons or [0] * len(batch.stream_ids)
        assert len(counts) == len(finishes) == len(batch.stream_ids)
        assert sum(counts) == len(batch.token_ids)
        start = 0
        for stream_id, position, count, finish in zip(batch.stream_ids, batch.first_positions, counts, finishes, strict=True):
            stream = self.streams[stream_id]
            assert stream.sequence.target is batch.target, "tokens went where they should go no more"
            assert position <= len(stream.tokens), "a gap in the output positions"
            new = array("i", batch.token_ids[start : start + count])
            known = stream.tokens[position : position + count]
            assert new[: len(known)] == known, "a position came again with another token"
            stream.tokens += new[len(known) :]
            start += count
            if finish:
                assert stream.finish is None, "a stream finished twice"
                stream.finish = FinishReason(finish)
        return True
