"""Goal: the small parts round the runner: spans, the mock, the machine, the launcher's decisions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from headrace.config.load import load_settings
from headrace.errors import ConfigError
from headrace.telemetry.traces import memory_tracer
from headrace.v1.common_pb2 import WorkHeader
from headrace.v1.scheduler_pb2 import StepResult
from headrace.v1.worker_pb2 import NewSequence, StepPlan
from services.worker import machine
from services.worker.batch_inputs import Limits
from services.worker.config import Settings
from services.worker.launcher import check_num_ranks, num_compute_threads, rank_specs, thread_environment
from services.worker.mock_runner import MockRunner
from services.worker.sequence_spans import SequenceSpans
from tests.patience import WAIT_S

TRACEPARENT = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"


def entering(slot: int, traceparent: str = TRACEPARENT) -> StepPlan:
    work = WorkHeader(request_id="r", traceparent=traceparent, enqueued_unix_ns=50)
    return StepPlan(new_sequences=[NewSequence(slot=slot, work=work, num_tokens=7)], row_slots=[slot], row_num_new_tokens=[4])


def test_a_traced_sequence_leaves_queue_prefill_and_decode_without_a_gap() -> None:
    tracer, exporter = memory_tracer()
    spans = SequenceSpans(tracer)
    spans.on_plan(entering(3), now_unix_ns=100)
    spans.on_result(StepResult(finished_unix_ns=150))
    spans.on_plan(StepPlan(row_slots=[3], row_num_new_tokens=[3]), now_unix_ns=160)
    spans.on_result(StepResult(slots=[3], token_ids=[5], finished_unix_ns=200))
    spans.on_result(StepResult(slots=[3], token_ids=[6], finished_unix_ns=220))
    spans.on_result(StepResult(slots=[8, 3], token_ids=[6, 7, 8, 9], num_tokens=[1, 3], finished_unix_ns=230))
    spans.on_plan(StepPlan(freed_slots=[3]), now_unix_ns=300)
    found = {span.name: (span.start_time, span.end_time) for span in exporter.get_finished_spans()}
    assert found == {"queue scheduler-worker": (50, 100), "worker.prefill": (100, 200), "worker.decode": (200, 300)}
    decode = exporter.get_finished_spans()[-1]
    assert decode.attributes["headrace.num_tokens"] == 5
    assert decode.parent.span_id == int("2" * 16, 16)


def test_a_sequence_given_up_in_its_prompt_leaves_its_prefill() -> None:
    tracer, exporter = memory_tracer()
    spans = SequenceSpans(tracer)
    spans.on_plan(entering(3), now_unix_ns=100)
    spans.end_all(now_unix_ns=130)
    assert [(span.name, span.end_time) for span in exporter.get_finished_spans()][1:] == [("worker.prefill", 130)]


def test_an_untraced_sequence_leaves_nothing() -> None:
    tracer, exporter = memory_tracer()
    spans = SequenceSpans(tracer)
    spans.on_plan(entering(3, traceparent=""), now_unix_ns=100)
    spans.on_result(StepResult(slots=[3], token_ids=[5], finished_unix_ns=200))
    spans.end_all(now_unix_ns=300)
    assert exporter.get_finished_spans() == ()


def test_mock_goes_on_the_same_way_when_a_sequence_is_computed_again(limits: Limits, plan: Callable[..., StepPlan]) -> None:
    slept: list[float] = []
    runner = MockRunner(limits, step_s=0.5, token_s=0.25, sleep=slept.append)
    first = runner.step(plan(new={0: 3}, pages={0: [0, 1]}, rows={0: 3}), np.array([1, 2, 3], dtype=np.int32))
    second = runner.step(plan(rows={0: 1}), None)
    again = plan(new={5: 4}, pages={5: [2, 3]}, rows={5: 4})
    moved = runner.step(again, np.array([1, 2, 3, first.token_ids[0]], dtype=np.int32))
    assert moved.token_ids == second.token_ids
    assert slept == [1.25, 0.75, 1.5]


def test_mock_worker_does_not_import_torch() -> None:
    code = "import sys, services.worker.service, services.worker.launcher; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=WAIT_S).returncode == 0


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_machine_reads_flags_and_memory_within_the_containers_limit(tmp_path: Path) -> None:
    assert machine.cpu_flags(tmp_path) == frozenset()
    write(
        tmp_path, proc__cpuinfo="processor\t: 0\nflags\t\t: fpu avx512_bf16\n", proc__meminfo="MemTotal: 9 kB\nMemAvailable: 8 kB\n"
    )
    assert machine.cpu_flags(tmp_path) == {"fpu", "avx512_bf16"}
    assert machine.available_memory_bytes(tmp_path) == 8192
    cgroup = {"sys__fs__cgroup__memory.max": "5000\n", "sys__fs__cgroup__memory.current": "1000\n"}
    write(tmp_path, **cgroup)
    assert machine.available_memory_bytes(tmp_path) == 4000
    write(tmp_path, **{"sys__fs__cgroup__memory.max": "max\n"})
    assert machine.available_memory_bytes(tmp_path) == 8192


@pytest.mark.parametrize(
    ("folder", "limit", "used", "prefix"),
    [
        ("sys__fs__cgroup", "memory.max", "memory.current", ""),
        ("sys__fs__cgroup__memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ],
)
def test_pages_of_files_in_a_container_can_be_given_up(tmp_path: Path, folder: str, limit: str, used: str, prefix: str) -> None:
    """Pulled weights fill a container's memory with pages of files; shared memory is none of those."""
    counts = {"inactive_file": 2000, "active_file": 500, "shmem": 100, "inactive_anon": 100}
    stat = "".join(f"{name} {1 if prefix else value}\n{prefix}{name} {value}\n" for name, value in counts.items())
    write(tmp_path, proc__meminfo="MemAvailable: 8 kB\n")
    write(tmp_path, **{f"{folder}__{limit}": "5000\n", f"{folder}__{used}": "4900\n", f"{folder}__memory.stat": stat})
    assert machine.available_memory_bytes(tmp_path) == 5000 - 4900 + 2500
    write(tmp_path, **{f"{folder}__{limit}": "9223372036854771712\n"})
    assert machine.available_memory_bytes(tmp_path) == 8192


def test_threads_are_physical_cores_within_the_containers_share(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    assert machine.num_usable_cores(tmp_path) == len(cpus)
    for cpu in cpus:
        # One core with many threads.
        write(tmp_path, **{f"sys__devices__system__cpu__cpu{cpu}__topology__core_id": "0"})
    assert machine.num_usable_cores(tmp_path) == 1
    write(tmp_path, **{"sys__fs__cgroup__cpu.max": "50000 100000"})
    assert machine.num_usable_cores(tmp_path) == 1
    assert num_compute_threads(Settings(num_threads=3)) == 3
    assert num_compute_threads(Settings()) == machine.num_usable_cores()


def test_openmp_settings_of_the_user_are_left_alone() -> None:
    assert thread_environment(2, {})["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in thread_environment(2, {"OMP_NUM_THREADS": "7"})


def test_ranks_die_together_and_more_than_one_is_refused() -> None:
    specs = rank_specs(load_settings(), Settings(num_threads=1), standby_fd=None)
    assert [(spec.name, spec.restart, spec.argv[-1]) for spec in specs] == [("rank-0", "never", "services.worker.rank")]
    check_num_ranks(1)
    with pytest.raises(ConfigError, match=r"worker\.num_ranks is 2; at most 1"):
        check_num_ranks(2)
