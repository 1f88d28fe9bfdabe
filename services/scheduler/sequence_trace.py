"""The spans of one sequence in the scheduler: the wait for a lane, then the run to its end. Times come from the shell."""

from __future__ import annotations

from headrace.telemetry import names
from headrace.telemetry.traces import Context, Span, Tracer
from services.scheduler.sequence import FinishReason, Sequence


class SequenceTrace:
    """Trace state of a sequence.

    Attributes:
        parent: The context its Submit came with.
        run: The span of its run, from its first step on; None while it has not run.
    """

    __slots__ = ("_queued_unix_ns", "_tracer", "parent", "run")

    def __init__(self, tracer: Tracer, parent: Context, queued_unix_ns: int) -> None:
        self.parent = parent
        self.run: Span | None = None
        self._tracer = tracer
        self._queued_unix_ns = queued_unix_ns

    def begin_run(self, sequence: Sequence, now_unix_ns: int) -> Context:
        """The sequence enters a worker. Returns the context that goes with it; a second entry belongs to the same run."""
        if self.run is None:
            self._record_queue(sequence, now_unix_ns)
            attributes = {names.ATTR_REQUEST_ID: sequence.request_id}
            self.run = self._tracer.start(
                names.SPAN_SCHEDULER_RUN, parent=self.parent, start_unix_ns=now_unix_ns, attributes=attributes
            )
        return self.run.context

    def end(self, sequence: Sequence, now_unix_ns: int, error_code: str | None) -> None:
        """The sequence has ended."""
        if self.run is None:
            self._record_queue(sequence, now_unix_ns)
            return
        self.run.set(names.ATTR_GEN_AI_OUTPUT_TOKENS, sequence.num_output_tokens)
        self.run.set(names.ATTR_GEN_AI_CACHED_TOKENS, sequence.num_cached_tokens)
        self.run.set(names.ATTR_NUM_PREEMPTIONS, sequence.num_preemptions)
        self.run.set(names.ATTR_GEN_AI_FINISH_REASONS, [FinishReason(sequence.finish_reason).name.lower()])
        if error_code is not None:
            self.run.error(error_code)
        self.run.end(now_unix_ns)

    def _record_queue(self, sequence: Sequence, now_unix_ns: int) -> None:
        self._tracer.record(
            names.SPAN_SCHEDULER_QUEUE,
            parent=self.parent,
            start_unix_ns=self._queued_unix_ns,
            end_unix_ns=now_unix_ns,
            attributes={names.ATTR_REQUEST_ID: sequence.request_id},
        )
