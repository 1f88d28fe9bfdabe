"""Brings the core's counts into the metrics, and sums up its load."""

from __future__ import annotations

from dataclasses import replace

from headrace.telemetry.metrics import SchedulerMetrics
from headrace.v1.control_pb2 import Load
from services.scheduler.counts import Counts
from services.scheduler.prefill_delayer import PassOutcome
from services.scheduler.scheduler import Scheduler


class Gauges:
    """Called at each tick of the links; a step itself touches few metrics."""

    def __init__(self, metrics: SchedulerMetrics) -> None:
        self._metrics = metrics
        self._seen = Counts()

    def update(self, core: Scheduler) -> Load:
        """Set the gauges, advance the counters, and return the load."""
        metrics, counts = self._metrics, core.counts
        load = Load(
            num_running=sum(lane.num_running for lane in core.lanes),
            num_waiting=len(core.queue),
            num_waiting_tokens=core.queue.num_tokens,
            num_free_pages=sum(lane.kv.num_usable for lane in core.lanes),
            num_total_pages=sum(lane.kv.pool.num_pages for lane in core.lanes),
            num_lanes=len(core.lanes),
            max_num_seqs=sum(lane.capacity.max_num_seqs for lane in core.lanes),
            num_kv_tokens=sum(lane.kv.pool.num_pages * lane.capacity.page_size for lane in core.lanes),
        )
        num_running_pages = load.num_total_pages - load.num_free_pages
        num_cached_pages = sum(lane.kv.tree.num_evictable for lane in core.lanes)
        metrics.sequences.labels("running").set(load.num_running)
        metrics.sequences.labels("waiting").set(load.num_waiting)
        metrics.sequences.labels("unsent").set(core.outbox.num_kept)
        metrics.pages.labels("free").set(load.num_free_pages - num_cached_pages)
        metrics.pages.labels("cached").set(num_cached_pages)
        metrics.pages.labels("running").set(num_running_pages)
        metrics.kv_usage.set(num_running_pages / load.num_total_pages if load.num_total_pages else 0.0)
        metrics.lanes.set(load.num_lanes)
        metrics.preemptions.inc(counts.num_preemptions - self._seen.num_preemptions)
        metrics.forks.inc(counts.num_forked - self._seen.num_forked)
        metrics.held.inc(counts.num_held - self._seen.num_held)
        metrics.limited_steps.inc(counts.num_limited_steps - self._seen.num_limited_steps)
        metrics.limited_tokens.inc(counts.num_limited_tokens - self._seen.num_limited_tokens)
        metrics.requeues.inc(counts.num_requeued - self._seen.num_requeued)
        num_ignored = counts.num_ignored_results + counts.num_ignored_rows
        metrics.ignored_results.inc(num_ignored - self._seen.num_ignored_results - self._seen.num_ignored_rows)
        self._seen = replace(counts)
        for outcome in core.groups.take_outcomes():
            self._observe(outcome)
        return load

    def _observe(self, outcome: PassOutcome) -> None:
        metrics, decision = self._metrics, outcome.decision
        allow, was_executed = str(decision.allow).lower(), str(outcome.was_executed).lower()
        metrics.delayer_outcomes.labels(decision.estimation, allow, decision.reason, was_executed).inc()
        if decision.allow and outcome.was_executed:
            metrics.delayer_wait_passes.observe(decision.waited_passes)
            metrics.delayer_wait.observe(decision.waited_ns / 1e9)
