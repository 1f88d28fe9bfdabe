"""The register of telemetry names: every span, attribute and metric has its constant here, and nowhere else.

docs/telemetry.md lists the same names for people; a contract test holds both to each other. Names reuse OpenTelemetry's
semantic conventions where one exists (messaging and gen_ai, pinned below, both in development) and carry our prefix elsewhere.
Prometheus metrics are declared in `metrics.py`, prefixed `headrace_`.
"""

from __future__ import annotations

SEMCONV_VERSION = "1.44.0"
"""The release of the semantic conventions whose names are used here."""

# Spans. A span that has a subject carries it in its name: `chat {model}`, `queue {edge}`.
SPAN_QUEUE = "queue"
"""Waiting in a link and its queues, from the sender's enqueue to the receiver's take-up; named `queue {edge}`."""
SPAN_ROUTER_HTTP = "router.http"
"""An HTTP request, from its head to its last byte; named by method and path."""
SPAN_ROUTER_GRPC = "router.grpc"
"""A gRPC call, from its arrival to its end; named by its method."""
SPAN_ROUTER_GENERATE = "router.generate"
"""One generation inside a client request; named `{operation} {model}` after gen_ai."""
SPAN_TOKENIZER_ENCODE = "tokenizer.encode"
"""Rendering the template, encoding, and checking lengths."""
SPAN_SCHEDULER_QUEUE = "scheduler.queue"
"""Waiting to be admitted to a lane."""
SPAN_SCHEDULER_RUN = "scheduler.run"
"""From the first step that holds the sequence to its end."""
SPAN_WORKER_PREFILL = "worker.prefill"
"""From the first step that computes the prompt to its last."""
SPAN_WORKER_DECODE = "worker.decode"
"""From the end of prefill to the sequence's release."""
SPAN_DETOKENIZER_STREAM = "detokenizer.stream"
"""From the opening of a stream to its end."""

# Attributes.
ATTR_REQUEST_ID = "headrace.request_id"
"""The router's name for a request, the same on every hop."""
ATTR_EDGE = "messaging.destination.name"
"""The edge of a queue span, for example router-scheduler."""
ATTR_MESSAGING_SYSTEM = "messaging.system"
"""Always zeromq."""
ATTR_ERROR_TYPE = "error.type"
"""The stable code of headrace/errors.py."""
ATTR_SERVICE_NAME = "service.name"
"""Resource: headrace. and the service."""
ATTR_SERVICE_INSTANCE = "service.instance.id"
"""Resource: the instance's stable name."""
ATTR_NUM_PREEMPTIONS = "headrace.num_preemptions"
"""Times a sequence was preempted."""
ATTR_NUM_TOKENS = "headrace.num_tokens"
"""Tokens of a span's work."""
ATTR_DECODE_NS = "headrace.decode_ns"
"""Time spent turning tokens to text, nanoseconds."""
ATTR_RENDER_NS = "headrace.render_ns"
"""Time spent rendering the chat template, nanoseconds."""
ATTR_ENCODE_NS = "headrace.encode_ns"
"""Time spent encoding, nanoseconds."""
ATTR_HTTP_ROUTE = "http.route"
"""Path of the endpoint."""
ATTR_HTTP_STATUS = "http.response.status_code"
"""Status of the answer."""
ATTR_RPC_METHOD = "rpc.method"
"""Method of a gRPC call."""
ATTR_GEN_AI_OPERATION = "gen_ai.operation.name"
"""chat or text_completion."""
ATTR_GEN_AI_PROVIDER = "gen_ai.provider.name"
"""Always headrace."""
ATTR_GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
"""The model asked for."""
ATTR_GEN_AI_REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
"""Most output tokens asked for."""
ATTR_GEN_AI_REQUEST_TEMPERATURE = "gen_ai.request.temperature"
"""Temperature asked for."""
ATTR_GEN_AI_REQUEST_TOP_P = "gen_ai.request.top_p"
"""Nucleus mass asked for."""
ATTR_GEN_AI_REQUEST_STREAM = "gen_ai.request.stream"
"""Whether the answer is streamed."""
ATTR_GEN_AI_RESPONSE_ID = "gen_ai.response.id"
"""Id of the answer."""
ATTR_GEN_AI_FINISH_REASONS = "gen_ai.response.finish_reasons"
"""Why the output ended."""
ATTR_GEN_AI_INPUT_TOKENS = "gen_ai.usage.input_tokens"
"""Prompt tokens."""
ATTR_GEN_AI_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
"""Output tokens."""
ATTR_GEN_AI_CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
"""Prompt tokens whose KV was reused."""

# Buckets, in seconds, shared by all services so that percentiles agree.
BUCKETS_DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
BUCKETS_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
BUCKETS_ITL_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
BUCKETS_STEP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
BUCKETS_ACCEPT_LENGTH = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 33)
# A wait of zero has a bucket of its own.
BUCKETS_DELAY_PASSES = (0, 1, 2, 5, 10, 20, 30, 100)
BUCKETS_DELAY_S = (0.0, 0.001, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 20.0, 100.0)
BUCKETS_QUEUE_S = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0)
