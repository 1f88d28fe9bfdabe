"""Spans of traced sequences: the wait for a plan's take-up, the prefill, the decode. Recorded when they are over.

One span a token would cost more than the token; a sequence has three. Sequences without a sampled trace context leave no mark here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

from headrace.telemetry import names
from headrace.telemetry.traces import Context, Tracer
from headrace.v1.scheduler_pb2 import StepResult
from headrace.v1.worker_pb2 import StepPlan
from headrace.wire.topology import SCHEDULER_WORKER


@dataclass(slots=True)
class _Traced:
    """One traced sequence; times are nanoseconds since the Unix epoch, zero before they are known."""

    context: Context
    request_id: str
    num_tokens: int
    num_cached_tokens: int
    prefill_start_unix_ns: int = 0
    prefill_end_unix_ns: int = 0
    num_output_tokens: int = 0


class SequenceSpans:
    """Follows plans and results, in order; a no-op while nothing is exported."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._traced: dict[int, _Traced] = {}

    def on_plan(self, plan: StepPlan, *, now_unix_ns: int) -> None:
        """A plan was taken up: some sequences are over, some begin."""
        if not self._tracer.is_on:
            return
        for slot in plan.freed_slots:
            self._end(slot, now_unix_ns)
        for sequence in plan.new_sequences:
            work = sequence.work
            context = Context(work.traceparent, work.tracestate)
            if context.is_sampled:
                self._tracer.record_queue(
                    SCHEDULER_WORKER.name, parent=context, enqueued_unix_ns=work.enqueued_unix_ns, taken_unix_ns=now_unix_ns
                )
                self._traced[sequence.slot] = _Traced(context, work.request_id, sequence.num_tokens, sequence.num_cached_tokens)
        for slot in plan.row_slots:
            traced = self._traced.get(slot)
            if traced is not None and not traced.prefill_start_unix_ns:
                traced.prefill_start_unix_ns = now_unix_ns

    def on_result(self, result: StepResult) -> None:
        """A step is over: a traced sequence's first token ends its prefill."""
        if not self._traced:
            return
        for slot, num_tokens in zip(result.slots, result.num_tokens or repeat(1), strict=False):
            traced = self._traced.get(slot)
            if traced is None:
                continue
            traced.num_output_tokens += num_tokens
            if not traced.prefill_end_unix_ns:
                traced.prefill_end_unix_ns = result.finished_unix_ns
                self._record_prefill(traced, result.finished_unix_ns)

    def on_vectors(self, result: StepResult) -> None:
        """Texts that were embedded are over with their step."""
        for slot in result.slots:
            self._traced.pop(slot, None)

    def end_all(self, *, now_unix_ns: int) -> None:
        """Every sequence is over: the scheduler is lost, or this process stops."""
        for slot in list(self._traced):
            self._end(slot, now_unix_ns)

    def _end(self, slot: int, now_unix_ns: int) -> None:
        traced = self._traced.pop(slot, None)
        if traced is None or not traced.prefill_start_unix_ns:
            return
        if not traced.prefill_end_unix_ns:
            # Given up in the middle of its prompt.
            self._record_prefill(traced, now_unix_ns)
            return
        self._tracer.record(
            names.SPAN_WORKER_DECODE,
            parent=traced.context,
            start_unix_ns=traced.prefill_end_unix_ns,
            end_unix_ns=now_unix_ns,
            attributes={names.ATTR_REQUEST_ID: traced.request_id, names.ATTR_NUM_TOKENS: traced.num_output_tokens},
        )

    def _record_prefill(self, traced: _Traced, end_unix_ns: int) -> None:
        self._tracer.record(
            names.SPAN_WORKER_PREFILL,
            parent=traced.context,
            start_unix_ns=traced.prefill_start_unix_ns,
            end_unix_ns=end_unix_ns,
            attributes={
                names.ATTR_REQUEST_ID: traced.request_id,
                names.ATTR_NUM_TOKENS: traced.num_tokens,
                names.ATTR_GEN_AI_CACHED_TOKENS: traced.num_cached_tokens,
            },
        )
