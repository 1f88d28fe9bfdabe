"""What is measured of one generation: latencies, counts, its span, and the one log line at its end. Time comes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.errors import HeadraceError
from headrace.telemetry import logs, names
from headrace.telemetry.metrics import RouterMetrics
from headrace.telemetry.traces import Context, Span, Tracer
from services.router.generation import Call, ConversationPrompt, GenerationRequest
from services.router.open_request import OpenRequest

log = logs.get_logger()


class Observation:
    """Follows one generation from accept to end."""

    def __init__(self, call: Call, generation: GenerationRequest, *, tracer: Tracer, metrics: RouterMetrics) -> None:
        self._call = call
        self._tracer = tracer
        self._metrics = metrics
        self._first_ns = 0
        # By choice, when its latest tokens came.
        self._last_ns: dict[int, int] = {}
        operation = "chat" if isinstance(generation.prompt, ConversationPrompt) else "text_completion"
        self.span: Span = tracer.start(names.SPAN_ROUTER_GENERATE, parent=call.context)
        if self.is_traced:
            self.span.rename(f"{operation} {generation.model}")
            for key, value in _request_attributes(call, generation, operation).items():
                self.span.set(key, value)

    @property
    def is_traced(self) -> bool:
        """Whether spans below this request are wanted."""
        return self._tracer.is_on and self.span.context.is_sampled

    @property
    def context(self) -> Context:
        """Trace context that messages of this request carry."""
        return self.span.context

    def on_tokens(self, choice: int, num_tokens: int, *, enqueued_unix_ns: int, now_ns: int, now_unix_ns: int) -> None:
        """Output of a choice came from a detokenizer."""
        if not num_tokens:
            return
        if not self._first_ns:
            self._first_ns = now_ns
            self._metrics.ttft.observe((now_ns - self._call.started_ns) / 1e9)
            self.record_queue("router-detokenizer", enqueued_unix_ns, now_unix_ns)
        last_ns = self._last_ns.get(choice)
        if last_ns is None:
            num_gaps, gap_ns = num_tokens - 1, 0
        else:
            # Tokens that came together share the time since the last ones.
            num_gaps, gap_ns = num_tokens, (now_ns - last_ns) // num_tokens
        for _ in range(num_gaps):
            self._metrics.itl.observe(gap_ns / 1e9)
        self._last_ns[choice] = now_ns

    def record_queue(self, edge: str, enqueued_unix_ns: int, now_unix_ns: int) -> None:
        """Record how long an answer was on its way to us."""
        self._tracer.record_queue(edge, parent=self.span.context, enqueued_unix_ns=enqueued_unix_ns, taken_unix_ns=now_unix_ns)

    def end(
        self,
        requests: Sequence[OpenRequest],
        error: HeadraceError | None,
        *,
        finish_reasons: Sequence[str | None],
        now_ns: int,
    ) -> None:
        """The generation is over, with all its choices; the prompt counts once."""
        first = requests[0]
        num_prompt = 0 if first.encoded is None else int(first.encoded.token_ids.size)
        num_outputs = [len(request.output_tokens) for request in requests]
        num_output, num_cached = sum(num_outputs), min(request.num_cached_tokens for request in requests)
        reasons = [reason for reason in finish_reasons if reason is not None]
        self._metrics.prompt_tokens.inc(num_prompt)
        self._metrics.output_tokens.inc(num_output)
        e2e_s = (now_ns - self._call.started_ns) / 1e9
        self._metrics.e2e.observe(e2e_s)
        if self.is_traced:
            self.span.set(names.ATTR_GEN_AI_INPUT_TOKENS, num_prompt)
            self.span.set(names.ATTR_GEN_AI_OUTPUT_TOKENS, num_output)
            self.span.set(names.ATTR_GEN_AI_CACHED_TOKENS, num_cached)
            if reasons:
                self.span.set(names.ATTR_GEN_AI_FINISH_REASONS, reasons)
            if error is not None:
                self.span.error(error.code, error.message)
        self.span.end()
        log.info(
            "request.finished" if error is None else "request.failed",
            request_id=self._call.request_id,
            endpoint=self._call.endpoint,
            model=first.generation.model,
            num_choices=len(requests),
            num_prompt_tokens=num_prompt,
            num_output_tokens=num_output,
            num_cached_tokens=num_cached,
            num_moves=sum(request.num_moves for request in requests),
            finish_reason=",".join(reasons) or None,
            e2e_s=round(e2e_s, 6),
            **self._latencies(max(num_outputs)),
            **({} if error is None else {"error_type": error.code, "error": error.message}),
            **({"trace_id": trace_id(self.context)} if self.context.traceparent else {}),
        )

    def _latencies(self, num_output: int) -> dict[str, float]:
        """Of the choice with the longest output."""
        if not self._first_ns:
            return {}
        found = {"ttft_s": round((self._first_ns - self._call.started_ns) / 1e9, 6)}
        if num_output > 1:
            found["tpot_s"] = round((max(self._last_ns.values()) - self._first_ns) / 1e9 / (num_output - 1), 6)
        return found


def trace_id(context: Context) -> str:
    """The trace id inside a traceparent."""
    parts = context.traceparent.split("-")
    return parts[1] if len(parts) > 1 else ""


def _request_attributes(call: Call, generation: GenerationRequest, operation: str) -> dict[str, Any]:
    sampling, stopping = generation.sampling, generation.stopping
    found = {
        names.ATTR_REQUEST_ID: call.request_id,
        names.ATTR_GEN_AI_OPERATION: operation,
        names.ATTR_GEN_AI_PROVIDER: "headrace",
        names.ATTR_GEN_AI_REQUEST_MODEL: generation.model,
        names.ATTR_GEN_AI_REQUEST_STREAM: call.is_streaming,
        names.ATTR_GEN_AI_RESPONSE_ID: call.request_id,
        names.ATTR_GEN_AI_REQUEST_MAX_TOKENS: stopping.max_tokens,
        names.ATTR_GEN_AI_REQUEST_TEMPERATURE: sampling.temperature,
        names.ATTR_GEN_AI_REQUEST_TOP_P: sampling.top_p,
    }
    return {key: value for key, value in found.items() if value is not None}
