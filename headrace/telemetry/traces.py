"""Traces over messages: W3C context in, spans out, nothing at all when tracing is off.

A span is begun and ended by hand, because most of ours are found after the fact (a queue wait is known when it is over) and none
lives on a thread's stack. Export goes through the OpenTelemetry SDK: OTLP over gRPC, JSON lines in a file, or memory.

Sources: W3C Trace Context level 2; OpenTelemetry trace SDK specification.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from opentelemetry import trace as otel
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from headrace.errors import ConfigError
from headrace.telemetry import names

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

SpanKind = otel.SpanKind
AttributeValue = str | int | float | bool | Sequence[str]

CLOSE_TIMEOUT_S = 2.0
"""For the last spans of a process, within the time that its supervisor gives it to end."""

_PROPAGATOR = TraceContextTextMapPropagator()
_SAMPLED_SUFFIX = "-01"


@dataclass(frozen=True, slots=True)
class Context:
    """W3C trace context as it travels in messages; both empty when there is none."""

    traceparent: str = ""
    tracestate: str = ""

    @property
    def is_sampled(self) -> bool:
        """Whether spans are wanted below this context."""
        return self.traceparent.endswith(_SAMPLED_SUFFIX)


NO_CONTEXT = Context()


class Span:
    """A span in the making. The shared no-op below does nothing and passes its parent's context on."""

    __slots__ = ("_span", "context")

    def __init__(self, span: otel.Span | None, context: Context) -> None:
        self._span = span
        self.context = context

    def set(self, key: str, value: AttributeValue) -> None:
        """Set an attribute; its key is one of `names.ATTR_*`."""
        if self._span is not None:
            self._span.set_attribute(key, value)

    def rename(self, name: str) -> None:
        """Give the span the name it turned out to deserve."""
        if self._span is not None:
            self._span.update_name(name)

    def error(self, code: str, message: str = "") -> None:
        """Mark the span failed with a stable error code."""
        if self._span is not None:
            self._span.set_attribute(names.ATTR_ERROR_TYPE, code)
            self._span.set_status(otel.Status(otel.StatusCode.ERROR, message or code))

    def end(self, end_unix_ns: int | None = None) -> None:
        """End the span, once; now, unless a time is given."""
        if self._span is not None:
            self._span.end(end_unix_ns if end_unix_ns is not None else time.time_ns())
            self._span = None


class Tracer:
    """Makes spans of one process. `is_on` is False when nothing is exported."""

    def __init__(self, provider: TracerProvider | None = None, *, sample_all: bool = True) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("headrace") if provider is not None else None
        self._sample_all = sample_all

    @property
    def is_on(self) -> bool:
        """Whether spans of this process go anywhere."""
        return self._tracer is not None

    def start(
        self,
        name: str,
        *,
        parent: Context = NO_CONTEXT,
        start_unix_ns: int | None = None,
        attributes: Mapping[str, AttributeValue] | None = None,
        kind: otel.SpanKind = otel.SpanKind.INTERNAL,
        root: bool = False,
    ) -> Span:
        """Begin a span under `parent`.

        Without a sampled parent nothing is recorded, except that `root=True` begins a trace of its own (a router's request span).
        """
        if self._tracer is None or not (parent.is_sampled or (root and not parent.traceparent and self._sample_all)):
            return Span(None, parent)
        span = self._tracer.start_span(
            name,
            context=_to_otel(parent),
            kind=kind,
            attributes=dict(attributes) if attributes else None,
            start_time=start_unix_ns if start_unix_ns is not None else time.time_ns(),
        )
        return Span(span, _from_otel(span))

    def record(
        self,
        name: str,
        *,
        parent: Context,
        start_unix_ns: int,
        end_unix_ns: int,
        attributes: Mapping[str, AttributeValue] | None = None,
    ) -> None:
        """Record a span that is over."""
        if self._tracer is not None and parent.is_sampled:
            self.start(name, parent=parent, start_unix_ns=start_unix_ns, attributes=attributes).end(max(start_unix_ns, end_unix_ns))

    def record_queue(self, edge: str, *, parent: Context, enqueued_unix_ns: int, taken_unix_ns: int) -> None:
        """Record the wait in a link: from the sender's enqueue to the take-up here."""
        if self._tracer is not None and parent.is_sampled and enqueued_unix_ns:
            self.record(
                f"{names.SPAN_QUEUE} {edge}",
                parent=parent,
                start_unix_ns=enqueued_unix_ns,
                end_unix_ns=taken_unix_ns,
                attributes={names.ATTR_MESSAGING_SYSTEM: "zeromq", names.ATTR_EDGE: edge},
            )

    def close(self) -> None:
        """Flush and end the exporters, as far as they come within `CLOSE_TIMEOUT_S`; what is left is lost with the process."""
        if self._provider is not None:
            # A collector that is down costs each batch its exporter's whole timeout, and nothing ends the SDK's own wait for it.
            closing = threading.Thread(target=self._provider.shutdown, name="traces-closing", daemon=True)
            closing.start()
            closing.join(CLOSE_TIMEOUT_S)


def _to_otel(context: Context) -> Any:
    if not context.traceparent:
        return None
    return _PROPAGATOR.extract({"traceparent": context.traceparent, "tracestate": context.tracestate})


def _from_otel(span: otel.Span) -> Context:
    span_context = span.get_span_context()
    flags = int(span_context.trace_flags) & 1
    traceparent = f"00-{span_context.trace_id:032x}-{span_context.span_id:016x}-{flags:02x}"
    return Context(traceparent, span_context.trace_state.to_header())


def configure(*, service: str, instance: str, otlp_endpoint: str = "", file: str = "", sample_all: bool = True) -> Tracer:
    """A tracer that exports where the settings say; off when neither an endpoint nor a file is set.

    Args:
        service: Resource attribute `service.name`, with the prefix `headrace.`.
        instance: Resource attribute `service.instance.id`.
        otlp_endpoint: OTLP/gRPC collector, for example "http://127.0.0.1:4317".
        file: Path of a JSON-lines file to append spans to; one line a span, written whole, so that processes may share it.
        sample_all: Trace requests that come without a trace context.
    """
    if not otlp_endpoint and not file:
        return Tracer()
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

    provider = make_provider(service, instance)
    if file:
        provider.add_span_processor(SimpleSpanProcessor(cast("SpanExporter", FileExporter(Path(file)))))
    if otlp_endpoint:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(endpoint=otlp_endpoint, insecure=otlp_endpoint.startswith("http://"), timeout=5)
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracer(provider, sample_all=sample_all)


def make_provider(service: str, instance: str) -> TracerProvider:
    """An SDK provider with our resource attributes and no processor yet. Made after any fork: its threads do not survive one."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    resource = Resource.create({names.ATTR_SERVICE_NAME: f"headrace.{service}", names.ATTR_SERVICE_INSTANCE: instance})
    return TracerProvider(resource=resource, shutdown_on_exit=False)


def memory_tracer(service: str = "test", instance: str = "test-0") -> tuple[Tracer, Any]:
    """A tracer for tests, and the in-memory exporter that holds its finished spans."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = make_provider(service, instance)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracer(provider), exporter


class FileExporter:
    """A SpanExporter by shape (the SDK is imported only when tracing is on): appends each span as one JSON line.

    O_APPEND and one write for whole lines keep the lines of several processes apart.
    """

    def __init__(self, path: Path) -> None:
        """Open, and make what is missing.

        Raises:
            ConfigError: It cannot be written to; the message names the setting.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"telemetry.trace_file {path} cannot be written to ({error.strerror})", param="telemetry.trace_file"
            ) from error

    def export(self, spans: Sequence[ReadableSpan]) -> Any:
        """Write spans; a full disk is reported to the SDK as a failure, never raised into a request."""
        from opentelemetry.sdk.trace.export import SpanExportResult

        try:
            self._file.write(b"".join(json.dumps(span_record(span)).encode() + b"\n" for span in spans))
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Close the file."""
        self._file.close()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing is buffered."""
        return True


def span_record(span: ReadableSpan) -> dict[str, Any]:
    """A span as plain data: ids in hex, times in unix nanoseconds."""
    context = span.get_span_context()
    assert context is not None
    return {
        "trace_id": f"{context.trace_id:032x}",
        "span_id": f"{context.span_id:016x}",
        "parent_id": f"{span.parent.span_id:016x}" if span.parent else "",
        "name": span.name,
        "service": span.resource.attributes.get(names.ATTR_SERVICE_NAME, ""),
        "instance": span.resource.attributes.get(names.ATTR_SERVICE_INSTANCE, ""),
        "start_unix_ns": span.start_time,
        "end_unix_ns": span.end_time,
        "status": span.status.status_code.name,
        "attributes": dict(span.attributes or {}),
    }
