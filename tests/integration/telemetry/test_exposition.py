"""Metrics, health and readiness over HTTP, and traces over OTLP: real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from prometheus_client import CollectorRegistry, Counter, Gauge

from headrace.errors import ConfigError
from headrace.telemetry import traces
from headrace.telemetry.exposition import Exposition
from tests.patience import WAIT_S


class Answers:
    """What the service would say."""

    reason: str | None = "no lanes"


@pytest.fixture
async def exposition() -> AsyncIterator[tuple[Exposition, Answers]]:
    registry, answers = CollectorRegistry(), Answers()
    Counter("headrace_things", "Things.", registry=registry).inc(3)
    made = Exposition(registry, health=lambda: {"state": "ready"}, not_ready_reason=lambda: answers.reason)
    await made.start("127.0.0.1", 0)
    yield made, answers
    await made.stop()


async def ask(port: int, raw: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), WAIT_S)
    writer.close()
    await writer.wait_closed()
    return answer


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        (b"/metrics", b"200 OK", b"headrace_things_total 3.0"),
        (b"/metrics?x=1", b"200 OK", b"headrace_things_total 3.0"),
        (b"/health", b"200 OK", b'"state": "ready"'),
        (b"/ready", b"503 Service Unavailable", b"no lanes"),
        (b"/secrets", b"404 Not Found", b"/metrics"),
    ],
)
async def test_questions_are_answered(exposition: tuple[Exposition, Answers], path: bytes, status: bytes, words: bytes) -> None:
    answer = await ask(exposition[0].port, b"GET " + path + b" HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert words in answer


async def test_ready_once_there_is_no_reason_against_it(exposition: tuple[Exposition, Answers]) -> None:
    exposition[1].reason = None
    assert (await ask(exposition[0].port, b"GET /ready HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("raw", [b"", b"\x00\xff\x00", b"GET /metrics", b"x" * 100_000, b"POST /metrics HTTP/1.1\r\n\r\n"])
async def test_nonsense_does_not_stop_the_next_question(exposition: tuple[Exposition, Answers], raw: bytes) -> None:
    try:
        answer = await ask(exposition[0].port, raw)
    except ConnectionError:
        # Cut off while it was still sending.
        answer = b""
    assert not answer or answer.startswith(b"HTTP/1.1 405")
    assert (await ask(exposition[0].port, b"GET /health HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200")


async def test_gauges_are_set_for_the_page_that_shows_them() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("headrace_things", "Things.", registry=registry)
    made = Exposition(registry, health=dict, not_ready_reason=lambda: None, refresh=gauge.inc)
    await made.start("127.0.0.1", 0)
    try:
        assert b"headrace_things 1.0" in await ask(made.port, b"GET /metrics HTTP/1.1\r\n\r\n")
        await ask(made.port, b"GET /health HTTP/1.1\r\n\r\n")
        assert b"headrace_things 2.0" in await ask(made.port, b"GET /metrics HTTP/1.1\r\n\r\n")
    finally:
        await made.stop()


async def test_busy_metrics_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        second = Exposition(CollectorRegistry(), health=dict, not_ready_reason=lambda: None)
        with pytest.raises(ConfigError, match=str(port)):
            await second.start("127.0.0.1", port)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what is exported."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


def test_spans_reach_an_otlp_collector() -> None:
    collector = Collector()
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        tracer = traces.configure(service="worker", instance="worker-0", otlp_endpoint=f"http://127.0.0.1:{port}")
        root = tracer.start("root", root=True)
        tracer.start("child", parent=root.context).end()
        root.end()
        tracer.close()
        server.stop(None).wait(WAIT_S)
    resources = [resource for request in collector.requests for resource in request.resource_spans]
    names = [span.name for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert sorted(names) == ["child", "root"]
    attributes = {attribute.key: attribute.value.string_value for attribute in resources[0].resource.attributes}
    assert attributes["service.name"] == "headrace.worker"
