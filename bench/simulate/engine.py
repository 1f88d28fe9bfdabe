"""Plays a trace against lanes on paper: the real scheduler core, a simulated clock, and workers that only take time.

Two kinds of events move the clock: a request arrives, a step ends. The plan of the next step leaves when a step ends, which is what
running ahead at the ideal moment amounts to. Lanes of one group begin their steps together and wait for the slowest.
"""

from __future__ import annotations

import gc
import heapq
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from bench.simulate.trace import VOCAB_SIZE, SimRequest
from headrace.errors import HeadraceError
from services.scheduler.lane import Lane, LaneCapacity
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
    """Time of a step in seconds: `base_s`, and so much a row, a further token of prompts, and 1,000 tokens of context."""

    base_s: float
    row_s: float
    token_s: float
    context_s: float = 0.0

    def duration_ns(self, plan: StepPlan, num_context_tokens: int) -> int:
        """The time of one step."""
        seconds = self.base_s + self.row_s * plan.num_rows + self.token_s * (plan.num_tokens - plan.num_rows)
        return int((seconds + self.context_s * num_context_tokens / 1000) * 1e9)


STEP_MODELS: Final = {
    # Two CPU cores with the default model, as `make bench` finds it.
    "cpu": StepModel(base_s=0.025, row_s=0.002, token_s=0.0009),
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
    max_waiting_requests: int = 10**7
    delayer_limits: DelayerLimits = field(default_factory=DelayerLimits)
    fixed_share: float | None = None
    """Admission by a fixed share of what is asked for, instead of by measured lengths."""
    asked_tokens: int | None = None
    """Output tokens every request allows, whatever it will get; None for just what it will get."""


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
    """What came of a run. Times are simulated seconds; arrays have an entry for each finished request, in order of finishing."""

    ttft_s: array[float]
    itl_s: array[float]
    e2e_s: array[float]
    num_requests: int
    num_rejected: int
    num_failed: int
    num_output_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_steps: int
    num_preemptions: int
    num_held: int
    max_waiting: int
    simulated_s: float
    busy_share: float
    wall_s: float
    core_s: float
    timeline: Timeline
    delayer: dict[str, int]

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
        at = next((index for index in reversed(range(len(self.timeline.all_had_work))) if self.timeline.all_had_work[index]), None)
        served = [counts[at] for counts in self.timeline.served.values()] if at is not None else []
        return max(served) / min(served) if len(served) > 1 and min(served) else None


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

    __slots__ = ("busy_ns", "ends", "is_busy", "lanes", "results")

    def __init__(self) -> None:
        self.lanes: list[Lane] = []
        # By lane and its decode tick, the stays whose last token that step samples.
        self.ends: dict[tuple[Lane, int], list[tuple[Sequence, int]]] = {}
        self.is_busy = False
        self.busy_ns = 0
        # Of the step under way.
        self.results: list[tuple[Lane, int]] = []


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
            run_ahead=False,
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
        self._first_ns = array("q")
        self._served: dict[str, int] = {}
        self.now_ns = 0
        self.outcome = Outcome(array("d"), array("d"), array("d"), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, Timeline(), {})

    def run(self, requests: Iterator[SimRequest], *, expected_s: float) -> Outcome:
        """Play a trace to its end; `expected_s` is how long it is about, for the distance of the samples."""
        begun_s = time.perf_counter()
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            self._play(requests, max(1, int(expected_s * 1e9 / self._num_samples)))
        finally:
            gc.enable()
            gc.unfreeze()
        outcome, counts = self.outcome, self.core.counts
        outcome.simulated_s = self.now_ns / 1e9
        outcome.num_steps, outcome.num_preemptions, outcome.num_held = counts.num_steps, counts.num_preemptions, counts.num_held
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
        site.lanes.append(lane)
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
            tokens=request.prompt,
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
        self._go_on()
        outcome.core_s += time.perf_counter() - began_s
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
        results, site.results = site.results, []
        began_s = time.perf_counter()
        for lane, duration_ns in results:
            step_id = next(iter(lane.in_flight))
            step = lane.in_flight[step_id]
            result = StepResult(step_id, step.sampled.slots, self._tokens(site, lane, step), duration_ns=duration_ns)
            self.core.step_result(lane, result, self.now_ns)
            for sequence in step.completed:
                if sequence.num_output_tokens == 1:
                    self._on_first_token(sequence)
        self._begin_step(site)
        self._go_on()
        self.outcome.core_s += time.perf_counter() - began_s

    def _go_on(self) -> None:
        """Set idle lanes to work that have got some, and note what has ended."""
        while self._lanes.newly_busy:
            lane, _ = self._lanes.newly_busy.popitem()
            site = self._site_of(lane)
            if not site.is_busy:
                self._begin_step(site)
        for ending in self.core.take_outcome().endings:
            self._on_ending(ending.sequence, is_good=ending.error is None)

    def _begin_step(self, site: _Site) -> None:
        model = self._cluster.step_model
        longest_ns = 0
        for lane in site.lanes:
            # A plan without rows only frees slots; another may follow it.
            while (plan := self.core.plan(lane, self.now_ns)) is not None:
                if plan.num_rows:
                    duration_ns = model.duration_ns(plan, lane.num_tokens)
                    longest_ns = max(longest_ns, duration_ns)
                    site.results.append((lane, duration_ns))
                    break
        if site.results:
            site.is_busy = True
            site.busy_ns += longest_ns
            self._num_events += 1
            heapq.heappush(self._events, (self.now_ns + longest_ns, self._num_events, site))

    def _on_first_token(self, sequence: Sequence) -> None:
        assert isinstance(sequence.trace, tuple)
        self._first_ns[sequence.trace[0]] = self.now_ns
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
        # Who has nothing waiting gets all it asks for.
        are_several = len(self._served) > 1
        line.all_had_work.append(are_several and {sequence.tenant for sequence in core.queue} == self._served.keys())
        for passed in core.groups.take_outcomes():
            name = passed.decision.reason or "none"
            self.outcome.delayer[name] = self.outcome.delayer.get(name, 0) + 1
