"""The figures: each against a value worked out by hand, percentiles against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.serve.records import RequestRecord
from bench.serve.summary import Slo, distribution, percentile, summarize

MS = 1_000_000


def record(start_ms: int, chunks_ms: list[int], end_ms: int, *, index: int = 0, usage: int | None = None) -> RequestRecord:
    return RequestRecord(
        index=index,
        started_ns=start_ms * MS,
        ended_ns=end_ms * MS,
        chunk_times_ns=[at * MS for at in chunks_ms],
        usage_output_tokens=usage,
        usage_prompt_tokens=None if usage is None else 10,
    )


def failed(start_ms: int, end_ms: int, kind: str) -> RequestRecord:
    return RequestRecord(index=9, started_ns=start_ms * MS, ended_ns=end_ms * MS, error_kind=kind, error_message="m")


@given(
    values=st.lists(st.floats(min_value=-1e6, max_value=1e6), min_size=1, max_size=50),
    percent=st.floats(min_value=0, max_value=100),
)
def test_percentile_is_the_one_numpy_calls_linear(values: list[float], percent: float) -> None:
    ordered = sorted(values)
    assert percentile(ordered, percent) == pytest.approx(float(np.percentile(ordered, percent)), rel=1e-9, abs=1e-6)


def test_percentile_of_no_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)


def test_distribution_leaves_out_what_is_not_there() -> None:
    found = distribution([4.0, None, 1.0, None, 3.0, 2.0])
    assert found is not None
    assert (found.count, found.mean, found.p50, found.max) == (4, 2.5, 2.5, 4.0)
    assert found.p90 == pytest.approx(3.7)
    assert distribution([None]) is None


def test_a_requests_own_figures() -> None:
    one = record(100, [150, 160, 190], 200, usage=3)
    assert one.ttft_ms == 50
    assert one.itl_ms == [10, 30]
    assert one.e2e_ms == 100
    assert one.tpot_ms == 25


def test_a_request_with_one_token_has_no_gap_and_one_without_any_has_no_first_token() -> None:
    assert record(0, [5], 6, usage=1).tpot_ms is None
    silent = record(0, [], 6, usage=0)
    assert (silent.ttft_ms, silent.tpot_ms, silent.itl_ms) == (None, None, [])


def test_tpot_counts_tokens_while_itl_counts_chunks() -> None:
    paired = record(0, [10, 30], 30, usage=5)
    assert paired.itl_ms == [20]
    assert paired.tpot_ms == 5


def test_throughput_counts_what_succeeded_over_the_time_of_all() -> None:
    records = [record(0, [10, 20], 20, usage=2), record(500, [600, 700], 1000, usage=2), failed(100, 2000, "http_429")]
    summary = summarize(records, client_cpu_s=0.1, slo=Slo())
    assert (summary.num_requests, summary.num_ok, summary.errors) == (3, 2, {"http_429": 1})
    assert summary.wall_s == 2.0
    assert summary.requests_per_s == 1.0
    assert summary.output_tokens_per_s == 2.0
    assert summary.total_tokens_per_s == 12.0
    assert summary.goodput_requests_per_s is None
    assert summary.ttft_ms is not None
    assert summary.ttft_ms.count == 2


def test_goodput_needs_both_limits_met() -> None:
    # TTFT, TPOT: (10, 10) meets both; (100, 10) and (10, 190) each break one; a single token has no gap to break.
    records = [
        record(0, [10, 20], 20, usage=2),
        record(0, [100, 110], 110, usage=2),
        record(0, [10, 200], 200, usage=2),
        record(0, [10], 1000, usage=1),
    ]
    summary = summarize(records, client_cpu_s=0, slo=Slo(ttft_ms=50, itl_ms=50))
    assert summary.goodput_requests_per_s == 2.0


@pytest.mark.parametrize(("cpu_s", "is_suspect"), [(0.19, False), (0.21, True)])
def test_a_busy_client_makes_its_figures_suspect(cpu_s: float, is_suspect: bool) -> None:
    assert summarize([record(0, [1], 1000)], client_cpu_s=cpu_s, slo=Slo()).is_suspect is is_suspect


@pytest.mark.parametrize(("usages", "source"), [([2, 2], "usage"), ([None, None], "chunks"), ([2, None], "mixed")])
def test_the_summary_says_where_the_token_counts_come_from(usages: list[int | None], source: str) -> None:
    summary = summarize([record(0, [1, 2], 3, usage=usage) for usage in usages], client_cpu_s=0, slo=Slo())
    assert summary.output_tokens_from == source
    assert summary.num_output_tokens == 4


def test_a_level_in_which_all_failed_has_no_latencies() -> None:
    summary = summarize([failed(0, 0, "connect"), failed(0, 0, "connect")], client_cpu_s=0, slo=Slo(ttft_ms=1))
    assert (summary.num_ok, summary.errors, summary.requests_per_s) == (0, {"connect": 2}, 0)
    assert summary.ttft_ms is None
    assert summary.output_tokens_from == "none"


def test_no_request_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one request"):
        summarize([], client_cpu_s=0, slo=Slo())
