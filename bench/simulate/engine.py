"""Plays a trace against lanes on paper: the real scheduler core, a simulated clock, and workers that only take time.

Two kinds of events move the clock: a request arrives, a step ends. A worker takes plans in order, and may hold several. Usually
the plan of the next step leaves when a step ends, which is what running ahead at the ideal moment amounts to; with `run_ahead` it
leaves as soon as the core gives one, while the step before it runs. Lanes of one group begin their steps together and wait for the
slowest.
"""

from __future__ import annotations

import gc
import heapq
import math
import time
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Final

from bench.simulate.trace import VOCAB_SIZE, SimRequest
from headrace.errors import HeadraceError
from services.scheduler.lane import Lane, LaneCapacity, StepRules
from services.scheduler.lanes import Lanes
from services.scheduler.outbox import Outbox
from services.scheduler.output_lengths import Float64Array, Int64Array
from services.scheduler.policies.registry import POLICIES
from services.scheduler.prefill_delayer import DelayerLimits
from services.scheduler.radix_tree import Eviction
from services.scheduler.scheduler import Scheduler
from services.scheduler.sequence import Sequence, StoppingRules
from services.scheduler.step_plan import StepInFlight, StepPlan, StepResult
from services.scheduler.waiting_queue import WaitingQueue

OUTPUT_TOKEN: Final = 1
END_TOKEN: Final = 0


@dataclass(frozen=True)
class StepModel:
    """Time of a step in seconds.

    Attributes:
        base_s: Whatever it computes.
        row_s: A row.
        token_s: A token of prompts.
        context_s: 1,000 tokens that running sequences have.
        depth_s: A token of prompts, again for each 1,000 tokens before its chunk.
    """

    base_s: float
    row_s: float
    token_s: float
    context_s: float = 0.0
    depth_s: float = 0.0

    def __post_init__(self) -> None:
        for name, seconds in asdict(self).items():
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
                raise ValueError(f"step model: {name} must be a number of at least 0, is {seconds!r}")
        if not self.base_s:
            raise ValueError("step model: base_s must be above 0")

    def duration_ns(self, plan: StepPlan, num_context_tokens: int, depth: int) -> int:
        """The time of one step; `depth` is how many tokens are before its prompts' chunks."""
        num_prompt_tokens = plan.num_tokens - plan.num_rows
        seconds = self.base_s + self.row_s * plan.num_rows
        seconds += num_prompt_tokens * (self.token_s + self.depth_s * depth / 1000)
        return int((seconds + self.context_s * num_context_tokens / 1000) * 1e9)


STEP_MODELS: Final = {
    # Two CPU cores with the default model, on torch.
    "cpu": StepModel(base_s=0.025, row_s=0.002, token_s=0.0009),
    # The same on native kernels.
    "native": StepModel(base_s=0.0023, row_s=0.00036, token_s=0.00022, depth_s=0.00011),
    # An accelerator with a model of some ten billion parameters.
    "accelerator": StepModel(base_s=0.008, row_s=0.00002, token_s=0.00002, context_s=0.000002),
}


class FixedShare:
    """Expects every output to take a fixed share of what it may still take; `share` 0 expects nothing."""

    longest = None

    def __init__(self, share: float) -> None:
        self._share = share

    def record(self, num_output_tokens: int) -> None:
        """Nothing is learnt."""

    def expected(self, made: Int64Array, limits: Int64Array, draws: Float64Array) -> Float64Array:
        """See `LengthEstimate`."""
        found: Float64Array = made + self._share * (limits - made)
        return found


@dataclass(frozen=True)
class Cluster:
    """What serves."""

    num_lanes: int = 1
    group_size: int = 1
    num_pages: int = 4096
    page_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int = 16_384
    policy: str = "fcfs"
    eviction: Eviction | None = "lru"
    step_model: StepModel = STEP_MODELS["cpu"]
    run_ahead: bool = False
    """Plan a step as soon as the one before it begins."""
    mixed_step_target_s: float = 0.0
    """See `services.scheduler.config`; 0 for no limit."""
    max_waiting_requests: int = 10**7
    delayer_limits: DelayerLimits = field(default_factory=DelayerLimits)
    fixed_share: float | None = None
    """Admission by a fixed share of what is asked for, instead of by measured lengths."""
    asked_tokens: int | None = None
    """Output tokens every request allows, whatever it will get; None for just what it will get."""


class GapHistogram:
    """Gaps between a request's tokens, each to within two hundredths. A step adds one entry, whatever its rows."""

    _SHORTEST_NS: Final = 1e4
    _GROWTH: Final = math.log(1.02)

    def __init__(self) -> None:
        self._counts = array("q", bytes(8 * 1024))

    def add(self, gap_ns: int, count: int) -> None:
        """Add a gap that `count` requests had."""
        index = int(math.log(max(gap_ns, self._SHORTEST_NS) / self._SHORTEST_NS) / self._GROWTH)
        self._counts[min(index, len(self._counts) - 1)] += count

    def percentile(self, percent: float) -> float | None:
        """Seconds, None where there was no gap."""
        total = sum(self._counts)
        left = percent / 100 * total
        for index, count in enumerate(self._counts):
            left -= count
            if count and left <= 0:
                return self._SHORTEST_NS * math.exp((index + 0.5) * self._GROWTH) / 1e9
        return None


@dataclass
class Timeline:
    """The state at regular moments of simulated time."""

    seconds: list[float] = field(default_factory=list)
    num_waiting: list[int] = field(default_factory=list)
    num_running: list[int] = field(default_factory=list)
    kv_usage: list[float] = field(default_factory=list)
    num_preemptions: list[int] = field(default_factory=list)
    num_prompt_tokens: list[int] = field(default_factory=list)
    num_cached_tokens: list[int] = field(default_factory=list)
    served: dict[str, list[int]] = field(default_factory=dict)
    all_had_work: list[bool] = field(default_factory=list)


@dataclass
class Outcome:
    """What came of a run. Times are simulated seconds but for two.

    Attributes:
        ttft_s: Time to first token of each finished request, in order of finishing.
        itl_s: Likewise the time per further output token; without those that had none.
        e2e_s: Likewise the time from arrival to end.
        gaps: Between tokens, over steps. What a preemption costs is in `itl_s` only.
        busy_share: Of the lanes' time, that in which they or their group computed.
        wall_s: Real seconds of the run.
        core_s: Those of them inside the core.
        delayer: Passes by the delayer's reason.
    """

    ttft_s: array[float] = field(default_factory=lambda: array("d"))
    itl_s: array[float] = field(default_factory=lambda: array("d"))
    e2e_s: array[float] = field(default_factory=lambda: array("d"))
    gaps: GapHistogram = field(default_factory=GapHistogram)
    num_requests: int = 0
    num_rejected: int = 0
    num_failed: int = 0
    num_output_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_requeued: int = 0
    num_held: int = 0
    num_limited_steps: int = 0
    max_waiting: int = 0
    simulated_s: float = 0.0
    busy_share: float = 0.0
    wall_s: float = 0.0
    core_s: float = 0.0
    timeline: Timeline = field(default_factory=Timeline)
    delayer: dict[str, int] = field(default_factory=dict)

    @property
    def output_tokens_per_s(self) -> float:
        """Throughput."""
        return self.num_output_tokens / self.simulated_s if self.simulated_s else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were cached."""
        return self.num_cached_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0

    @property
    def fairness(self) -> float | None:
        """Tokens served to the tenant that got most, for each of the one that got least, while all had some waiting; else None."""
        line = self.timeline
        spans = [index for index in range(1, len(line.seconds)) if line.all_had_work[index - 1] and line.all_had_work[index]]
        served = [sum(counts[index] - counts[index - 1] for index in spans) for counts in line.served.values()]
        return max(served) / min(served) if len(served) > 1 and min(served) > 0 else None


class _Lanes(Lanes):
    """Remembers which lanes took a sequence, so that idle ones can be set to work."""

    def __init__(self) -> None:
        super().__init__()
        self.newly_busy: dict[Lane, None] = {}

    def took(self, lane: Lane, sequence: Sequence) -> None:
        super().took(lane, sequence)
        self.newly_busy[lane] = None


class _Site:
    """Lanes that step together, one in most cases."""

    __slots__ = ("busy_ns", "ends", "is_busy", "lanes", "step")

    def __init__(self) -> None:
        # Each with the plans at its worker, the one under way included.
        self.lanes: dict[Lane, deque[StepPlan]] = {}
        # By lane and its decode tick, the stays whose last token that step samples.
        self.ends: dict[tuple[Lane, int], list[tuple[Sequence, int]]] = {}
        self.is_busy = False
        self.busy_ns = 0
        # Of the step under way, each lane's own time.
        self.step: list[tuple[Lane, int]] = []


class Simulation:
    """One run."""

    def __init__(self, cluster: Cluster, *, num_samples: int = 400) -> None:
        self._cluster = cluster
        self._lanes = _Lanes()
        queue = WaitingQueue(POLICIES[cluster.policy](self._lanes), max_requests=cluster.max_waiting_requests, max_tokens=10**12)
        self.core = Scheduler(
            self._lanes,
            queue,
            Outbox(linger_s=30),
            cluster.eviction,
            rules=StepRules(cluster.run_ahead, mixed_step_target_ns=int(cluster.mixed_step_target_s * 1e9)),
            preemption_threshold=10 if cluster.policy == "priority" else None,
            lengths=None if cluster.fixed_share is None else FixedShare(cluster.fixed_share),
            delayer_limits=cluster.delayer_limits,
        )
        self._target = self.core.outbox.target("nowhere", 1)
        self._sites: dict[int, _Site] = {}
        for index in range(cluster.num_lanes):
            self._join(index)
        self._events: list[tuple[int, int, _Site]] = []
        self._num_events = 0
        self._num_samples = num_samples
        self._arrival_ns = array("q")
        # Zero until there is one.
        self._first_ns = array("q")
        # By lane, when its last result came.
        self._result_ns = array("q", bytes(8 * cluster.num_lanes))
        self._served: dict[str, int] = {}
        self.now_ns = 0
        self.outcome = Outcome()

    def run(self, requests: Iterator[SimRequest], *, expected_s: float) -> Outcome:
        """Play a trace to its end; `expected_s` is how long it is about, for the distance of the samples.

        Raises:
            RuntimeError: The core has nothing to compute and holds requests that have not ended.
        """
        begun_s = time.perf_counter()
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            self._play(requests, max(1, int(expected_s * 1e9 / self._num_samples)))
        finally:
            gc.enable()
            gc.unfreeze()
        if self.core.num_requests:
            raise RuntimeError(f"{self.core.num_requests} requests never ended: the core gives no plan for them")
        outcome, counts = self.outcome, self.core.counts
        outcome.simulated_s = self.now_ns / 1e9
        outcome.num_steps, outcome.num_preemptions = counts.num_steps, counts.num_preemptions
        outcome.num_requeued, outcome.num_held = counts.num_requeued, counts.num_held
        outcome.num_limited_steps = counts.num_limited_steps
        busy_ns = sum(site.busy_ns * len(site.lanes) for site in {id(s): s for s in self._sites.values()}.values())
        outcome.busy_share = busy_ns / (self.now_ns * self._cluster.num_lanes) if self.now_ns else 0.0
        outcome.wall_s = time.perf_counter() - begun_s
        return outcome

    def _join(self, index: int) -> None:
        cluster = self._cluster
        group = f"group-{index // cluster.group_size}" if cluster.group_size > 1 else ""
        capacity = LaneCapacity(
            model="m",
            max_model_len=cluster.max_model_len,
            vocab_size=VOCAB_SIZE,
            num_pages=cluster.num_pages,
            page_size=cluster.page_size,
            max_num_seqs=cluster.max_num_seqs,
            max_num_batched_tokens=cluster.max_num_batched_tokens,
            group=group,
        )
        lane = self.core.lane_joined(index + 1, capacity, 0)
        site = self._sites[index // cluster.group_size * cluster.group_size] if group and index % cluster.group_size else _Site()
        site.lanes[lane] = deque()
        self._sites[index] = site

    def _site_of(self, lane: Lane) -> _Site:
        return self._sites[lane.lane_id - 1]

    def _play(self, requests: Iterator[SimRequest], sample_ns: int) -> None:
        next_sample_ns = 0
        request = next(requests, None)
        while request is not None or self._events:
            if request is not None and (not self._events or request.arrival_ns <= self._events[0][0]):
                self.now_ns = max(self.now_ns, request.arrival_ns)
                self._submit(request)
                request = next(requests, None)
            else:
                self.now_ns, _, site = heapq.heappop(self._events)
                self._end_step(site)
            if self.now_ns >= next_sample_ns:
                self._sample()
                next_sample_ns = self.now_ns + sample_ns
        self._sample()

    def _submit(self, request: SimRequest) -> None:
        outcome = self.outcome
        index = outcome.num_requests
        outcome.num_requests += 1
        sequence = Sequence(
            request_id=str(index),
            stream_id=index,
            owner=1,
            model="m",
            # A copy: outputs are appended to it.
            tokens=request.prompt[:],
            num_prompt_tokens=len(request.prompt),
            stopping=self._stopping(request),
            target=self._target,
            trace=(index, request.num_output_tokens),
            tenant=request.tenant,
            priority=request.priority,
        )
        self._arrival_ns.append(self.now_ns)
        self._first_ns.append(0)
        self._served.setdefault(request.tenant, 0)
        began_s = time.perf_counter()
        try:
            self.core.submit(sequence, self.now_ns)
        except HeadraceError:
            outcome.num_rejected += 1
        outcome.core_s += time.perf_counter() - began_s
        self._go_on()
        outcome.max_waiting = max(outcome.max_waiting, len(self.core.queue))

    def _stopping(self, request: SimRequest) -> StoppingRules:
        asked = self._cluster.asked_tokens
        if asked is None:
            return StoppingRules(max_tokens=request.num_output_tokens)
        return StoppingRules(frozenset({END_TOKEN}), max_tokens=max(asked, request.num_output_tokens))

    def _tokens(self, site: _Site, lane: Lane, step: StepInFlight) -> list[int]:
        """What a step samples: the end for those that have all they will get."""
        slots = step.sampled.slots
        tokens = [OUTPUT_TOKEN] * len(slots)
        if self._cluster.asked_tokens is None:
            return tokens
        for sequence in step.completed:
            assert isinstance(sequence.trace, tuple)
            last_tick = step.tick + sequence.trace[1] - sequence.num_output_tokens - 1
            site.ends.setdefault((lane, last_tick), []).append((sequence, sequence.admission))
        for sequence, admission in site.ends.pop((lane, step.tick), ()):
            if sequence.lane is lane and sequence.admission == admission:
                tokens[slots.index(sequence.slot)] = END_TOKEN
        return tokens

    def _end_step(self, site: _Site) -> None:
        site.is_busy = False
        under_way, site.step = site.step, []
        outcome = self.outcome
        for lane, duration_ns in under_way:
            plan = site.lanes[lane].popleft()
            step = lane.in_flight[plan.step_id]
            result = StepResult(plan.step_id, step.sampled.slots, self._tokens(site, lane, step), duration_ns=duration_ns)
            began_s = time.perf_counter()
            self.core.step_result(lane, result, self.now_ns)
            outcome.core_s += time.perf_counter() - began_s
            last_ns, self._result_ns[lane.lane_id - 1] = self._result_ns[lane.lane_id - 1], self.now_ns
            if num_decodes := len(step.sampled.slots) - len(step.completed):
                outcome.gaps.add(self.now_ns - last_ns, num_decodes)
            for sequence in step.completed:
                # Its row may have been dropped, and it may have run before.
                if sequence.num_output_tokens == 1:
                    self._on_first_token(sequence)
        self._begin_step(site)
        self._go_on()

    def _go_on(self) -> None:
        """Set lanes to work that have got some, and note what has ended."""
        while self._lanes.newly_busy:
            lane, _ = self._lanes.newly_busy.popitem()
            site = self._site_of(lane)
            if not site.is_busy:
                self._begin_step(site)
            elif self._cluster.run_ahead:
                self._take_plans(site)
        began_s = time.perf_counter()
        outcome = self.core.take_outcome()
        self.outcome.core_s += time.perf_counter() - began_s
        for ending in outcome.endings:
            self._on_ending(ending.sequence, is_good=ending.error is None)

    def _take_plans(self, site: _Site) -> None:
        """Bring the workers all plans that they can have now."""
        began_s = time.perf_counter()
        is_asking = True
        while is_asking:
            for lane, plans in site.lanes.items():
                while len(plans) < lane.max_in_flight and (plan := self.core.plan(lane, self.now_ns)) is not None:
                    # One without rows only frees slots and is not answered; another may follow it.
                    if plan.num_rows:
                        plans.append(plan)
            # In a group one lane's question may have made plans for others.
            is_asking = any(len(plans) < len(lane.in_flight) for lane, plans in site.lanes.items())
        self.outcome.core_s += time.perf_counter() - began_s

    def _begin_step(self, site: _Site) -> None:
        self._take_plans(site)
        model = self._cluster.step_model
        longest_ns = 0
        for lane, plans in site.lanes.items():
            if plans:
                share = lane.in_flight[plans[0].step_id].share
                duration_ns = model.duration_ns(plans[0], lane.num_tokens, share.depth if share is not None else 0)
                longest_ns = max(longest_ns, duration_ns)
                site.step.append((lane, duration_ns))
        if not site.step:
            return
        site.busy_ns += longest_ns
        site.is_busy = True
        self._num_events += 1
        heapq.heappush(self._events, (self.now_ns + longest_ns, self._num_events, site))

    def _on_first_token(self, sequence: Sequence) -> None:
        assert isinstance(sequence.trace, tuple)
        index = sequence.trace[0]
        if self._first_ns[index]:
            return
        self._first_ns[index] = self.now_ns
        self.outcome.num_prompt_tokens += sequence.num_prompt_tokens
        self.outcome.num_cached_tokens += sequence.num_cached_tokens
        self._served[sequence.tenant] += sequence.num_prompt_tokens

    def _on_ending(self, sequence: Sequence, *, is_good: bool) -> None:
        assert isinstance(sequence.trace, tuple)
        index, outcome = sequence.trace[0], self.outcome
        outcome.num_output_tokens += sequence.num_output_tokens
        self._served[sequence.tenant] += 2 * sequence.num_output_tokens
        if not is_good:
            outcome.num_failed += 1
            return
        arrival_ns, first_ns = self._arrival_ns[index], self._first_ns[index]
        outcome.ttft_s.append((first_ns - arrival_ns) / 1e9)
        outcome.e2e_s.append((self.now_ns - arrival_ns) / 1e9)
        if sequence.num_output_tokens > 1:
            outcome.itl_s.append((self.now_ns - first_ns) / 1e9 / (sequence.num_output_tokens - 1))

    def _sample(self) -> None:
        line, core = self.outcome.timeline, self.core
        line.seconds.append(self.now_ns / 1e9)
        line.num_waiting.append(len(core.queue))
        line.num_running.append(core.num_requests - len(core.queue))
        lanes = list(core.lanes)
        line.kv_usage.append(sum(lane.kv.usage for lane in lanes) / len(lanes))
        line.num_preemptions.append(core.counts.num_preemptions)
        line.num_prompt_tokens.append(self.outcome.num_prompt_tokens)
        line.num_cached_tokens.append(self.outcome.num_cached_tokens)
        for tenant, served in self._served.items():
            counts = line.served.setdefault(tenant, [0] * (len(line.seconds) - 1))
            counts.append(served)
        line.all_had_work.append(self._have_all_work())
        for passed in core.groups.take_outcomes():
            name = passed.decision.reason or "none"
            self.outcome.delayer[name] = self.outcome.delayer.get(name, 0) + 1

    def _have_all_work(self) -> bool:
        """Whether each of several tenants has something waiting: who has nothing gets all it asks for."""
        missing = set(self._served)
        if len(missing) < 2:
            return False
        for sequence in self.core.queue:
            missing.discard(sequence.tenant)
            if not missing:
                return True
        return False
