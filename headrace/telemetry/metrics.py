"""Prometheus metrics, one frozen group a reader, declared on the registry of the process.

One registry a process and no multi-process directory: services scale as processes with ports of their own, and a scrape of
each adds up. Labels are closed sets; a request id is never one.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from headrace.telemetry import names


class WireMetrics:
    """Links of any process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.messages = Counter(
            "headrace_wire_messages", "Messages by edge, direction and arm.", ["edge", "direction", "arm"], registry=registry
        )
        self.bytes = Counter("headrace_wire_bytes", "Bytes by edge and direction.", ["edge", "direction"], registry=registry)
        self.dropped = Counter(
            "headrace_wire_dropped", "Messages dropped, by edge and reason.", ["edge", "reason"], registry=registry
        )
        self.overloads = Counter(
            "headrace_wire_overloads", "Sends refused because a peer's queue was full.", ["edge"], registry=registry
        )
        self.peers = Gauge("headrace_wire_peers", "Registered peers, by edge and role.", ["edge", "role"], registry=registry)
        self._counted: dict[tuple[str, str, str], tuple[Counter, Counter]] = {}

    def count(self, edge: str, direction: str, arm: str, num_bytes: int) -> None:
        """Count one message. Children are looked up once: a link carries thousands a second."""
        counted = self._counted.get((edge, direction, arm))
        if counted is None:
            counted = self.messages.labels(edge, direction, arm), self.bytes.labels(edge, direction)
            self._counted[edge, direction, arm] = counted
        counted[0].inc()
        counted[1].inc(num_bytes)


class ServiceMetrics:
    """State of any service."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.state = Gauge("headrace_service_state", "1 for the state the service is in.", ["state"], registry=registry)
        self.info = Gauge(
            "headrace_service_info",
            "Always 1; labels say which build this is.",
            ["service", "instance", "version"],
            registry=registry,
        )


class RouterMetrics:
    """Client requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "headrace_requests", "Client requests by endpoint and status.", ["endpoint", "status"], registry=registry
        )
        self.failures = Counter(
            "headrace_request_failures", "Failed requests by stable error code.", ["error_type"], registry=registry
        )
        self.open_requests = Gauge("headrace_router_open_requests", "Requests not yet answered in full.", registry=registry)
        self.ttft = Histogram(
            "headrace_time_to_first_token_seconds",
            "Accept to first output token sent.",
            buckets=names.BUCKETS_TTFT_S,
            registry=registry,
        )
        self.itl = Histogram(
            "headrace_inter_token_latency_seconds", "Gap between output tokens.", buckets=names.BUCKETS_ITL_S, registry=registry
        )
        self.e2e = Histogram(
            "headrace_request_duration_seconds", "Accept to last byte.", buckets=names.BUCKETS_DURATION_S, registry=registry
        )
        self.prompt_tokens = Counter("headrace_prompt_tokens", "Prompt tokens of finished requests.", registry=registry)
        self.output_tokens = Counter("headrace_output_tokens", "Output tokens of finished requests.", registry=registry)
        self.slow_clients = Counter(
            "headrace_router_slow_clients", "Clients cut off because they left their output unread.", registry=registry
        )
        self.moves = Counter(
            "headrace_router_moves", "Requests moved because an instance was lost, by its role.", ["role"], registry=registry
        )


class TokenizerMetrics:
    """Encoding."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "headrace_tokenizer_requests", "Requests by kind and outcome.", ["kind", "outcome"], registry=registry
        )
        self.tokens = Counter("headrace_tokenizer_tokens", "Tokens encoded.", registry=registry)
        self.duration = Histogram(
            "headrace_tokenizer_duration_seconds", "Take-up to reply.", buckets=names.BUCKETS_STEP_S, registry=registry
        )
        self.queue = Gauge("headrace_tokenizer_queue", "Requests waiting for a thread.", registry=registry)


class SchedulerMetrics:
    """Queues, lanes, pages."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.sequences = Gauge("headrace_scheduler_sequences", "Sequences by state.", ["state"], registry=registry)
        self.pages = Gauge(
            "headrace_kv_pages", "KV pages by state (free, cached, running), over all lanes.", ["state"], registry=registry
        )
        self.kv_usage = Gauge(
            "headrace_kv_cache_usage_ratio", "Pages that running sequences use, 0 to 1, over all lanes.", registry=registry
        )
        self.lanes = Gauge("headrace_scheduler_lanes", "Registered lanes.", registry=registry)
        self.steps = Counter("headrace_scheduler_steps", "Steps planned.", registry=registry)
        self.step_tokens = Counter("headrace_scheduler_step_tokens", "Tokens planned.", registry=registry)
        self.step_duration = Histogram(
            "headrace_step_duration_seconds", "Plan sent to result handled.", buckets=names.BUCKETS_STEP_S, registry=registry
        )
        self.plan_duration = Histogram(
            "headrace_scheduler_plan_seconds", "Time to plan one step.", buckets=names.BUCKETS_QUEUE_S, registry=registry
        )
        self.preemptions = Counter("headrace_preemptions", "Sequences preempted.", registry=registry)
        self.delayer_outcomes = Counter(
            "headrace_prefill_delayer_outcomes",
            "Passes of lanes that step together, by what was decided on new prefills.",
            ["input_estimation", "output_allow", "output_reason", "actual_execution"],
            registry=registry,
        )
        self.delayer_wait_passes = Histogram(
            "headrace_prefill_delayer_wait_passes",
            "Passes by which prefills that began had been put off.",
            buckets=names.BUCKETS_DELAY_PASSES,
            registry=registry,
        )
        self.delayer_wait = Histogram(
            "headrace_prefill_delayer_wait_seconds",
            "Time by which prefills that began had been put off.",
            buckets=names.BUCKETS_DELAY_S,
            registry=registry,
        )
        self.forks = Counter("headrace_scheduler_forks", "Sequences that took over a running one's prompt.", registry=registry)
        self.held = Counter(
            "headrace_scheduler_held", "Waits for the same prefix to be computed for another sequence.", registry=registry
        )
        self.limited_steps = Counter(
            "headrace_scheduler_limited_steps",
            "Steps that took fewer prompt tokens than the budget allowed, so as not to keep decodes waiting.",
            registry=registry,
        )
        self.limited_tokens = Counter("headrace_scheduler_limited_step_prompt_tokens", "Prompt tokens of these.", registry=registry)
        self.requeues = Counter("headrace_scheduler_requeues", "Sequences requeued because their lane was lost.", registry=registry)
        self.rejections = Counter(
            "headrace_scheduler_rejections", "Requests refused, by stable error code.", ["error_type"], registry=registry
        )
        self.queue_wait = Histogram(
            "headrace_scheduler_queue_wait_seconds", "Arrival to first step.", buckets=names.BUCKETS_QUEUE_S, registry=registry
        )
        self.ignored_results = Counter(
            "headrace_scheduler_ignored_results", "Result rows for sequences not held.", registry=registry
        )


class WorkerMetrics:
    """Steps computed."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.steps = Counter("headrace_worker_steps", "Steps computed.", registry=registry)
        self.tokens = Counter("headrace_worker_tokens", "Tokens computed, by phase.", ["phase"], registry=registry)
        self.step_duration = Histogram(
            "headrace_worker_step_seconds", "Compute time of a step.", buckets=names.BUCKETS_STEP_S, registry=registry
        )
        self.draft_tokens = Counter(
            "headrace_worker_draft_tokens", "Drafts verified, by outcome: accepted or rejected.", ["outcome"], registry=registry
        )
        self.accept_length = Histogram(
            "headrace_worker_accept_length_tokens",
            "Tokens that a row with drafts gave: those accepted and one more.",
            buckets=names.BUCKETS_ACCEPT_LENGTH,
            registry=registry,
        )
        self.idle = Counter(
            "headrace_worker_idle_seconds",
            "Time between steps with sequences held and none computed.",
            registry=registry,
        )
        self.sequences = Gauge("headrace_worker_sequences", "Sequences held.", registry=registry)
        self.row_errors = Counter("headrace_worker_row_errors", "Rows that failed, by reason.", ["reason"], registry=registry)
        self.dropped_results = Counter(
            "headrace_worker_dropped_results", "Results of steps whose scheduler was lost meanwhile.", registry=registry
        )


class DetokenizerMetrics:
    """Streams decoded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.streams = Gauge("headrace_detokenizer_streams", "Open streams.", registry=registry)
        self.tokens = Counter("headrace_detokenizer_tokens", "Tokens decoded.", registry=registry)
        self.batches = Counter("headrace_detokenizer_batches", "Token batches handled.", registry=registry)
        self.stops = Counter("headrace_detokenizer_stops", "Streams ended by a stop string.", registry=registry)
        self.gaps = Counter("headrace_detokenizer_gaps", "Gaps found in a stream's positions.", registry=registry)
        self.dropped = Counter("headrace_detokenizer_dropped_streams", "Streams dropped, by reason.", ["reason"], registry=registry)
