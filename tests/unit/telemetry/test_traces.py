"""Spans over messages."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from headrace.telemetry import traces
from tests.patience import WAIT_S


def test_child_in_another_process_hangs_below_its_parent() -> None:
    front, front_spans = traces.memory_tracer("router")
    back, back_spans = traces.memory_tracer("worker")
    root = front.start("root", root=True)
    back.start("child", parent=root.context).end()
    root.end()
    (child,), (parent,) = back_spans.get_finished_spans(), front_spans.get_finished_spans()
    assert child.parent.span_id == parent.context.span_id
    assert child.context.trace_id == parent.context.trace_id


def test_without_a_sampled_parent_nothing_is_recorded_and_the_context_passes_on() -> None:
    tracer, spans = traces.memory_tracer()
    unsampled = traces.Context("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00", "a=b")
    for parent in (unsampled, traces.NO_CONTEXT):
        span = tracer.start("x", parent=parent)
        assert span.context == parent
        span.end()
    assert spans.get_finished_spans() == ()


def test_unsampled_request_stays_unsampled_at_the_root() -> None:
    tracer, spans = traces.memory_tracer()
    parent = traces.Context("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")
    tracer.start("root", parent=parent, root=True).end()
    assert spans.get_finished_spans() == ()


def test_tracer_that_is_off_makes_no_op_spans() -> None:
    tracer = traces.Tracer()
    span = tracer.start("x", root=True)
    span.set("k", 1)
    span.error("internal_error")
    span.end()
    assert not tracer.is_on
    assert span.context == traces.NO_CONTEXT


def test_queue_wait_is_a_span_from_enqueue_to_take_up() -> None:
    tracer, spans = traces.memory_tracer()
    root = tracer.start("root", root=True)
    tracer.record_queue("router-scheduler", parent=root.context, enqueued_unix_ns=100, taken_unix_ns=250)
    (span,) = spans.get_finished_spans()
    assert (span.name, span.start_time, span.end_time) == ("queue router-scheduler", 100, 250)


def test_file_holds_one_json_line_a_span(tmp_path: Path) -> None:
    file = tmp_path / "t" / "spans.jsonl"
    for service in ("router", "worker"):
        tracer = traces.configure(service=service, instance=f"{service}-0", file=str(file))
        tracer.start("a", root=True, attributes={"headrace.num_steps": 3}).end()
        tracer.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["service"] for line in lines] == ["headrace.router", "headrace.worker"]
    assert lines[0]["attributes"] == {"headrace.num_steps": 3}


def test_a_collector_that_does_not_answer_is_not_waited_for_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Method: the exporter's last export stands still until the test is over, as one to a collector that is down does."""
    is_over, exported = threading.Event(), threading.Event()
    monkeypatch.setattr(traces, "CLOSE_TIMEOUT_S", 0.01)
    tracer, spans = traces.memory_tracer()

    def export_at_last() -> None:
        is_over.wait(WAIT_S / 10)
        exported.set()

    monkeypatch.setattr(spans, "shutdown", export_at_last)
    tracer.close()
    assert not exported.is_set()
    is_over.set()
    assert exported.wait(WAIT_S)
