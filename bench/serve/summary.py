"""Statistics of one load level, from the records of its requests. Pure.

Definitions
- Percentile p of n sorted samples: linear interpolation at rank (n - 1) * p / 100, counted from 0 (Hyndman and Fan's type 7,
  numpy's default).
- Wall time: first request sent to last request ended. Throughput counts successful requests and their tokens only.
- ITL is pooled: one sample a gap, over all successful requests. TPOT is one sample a request.
- Goodput: successful requests a second whose TTFT is within the TTFT limit and whose TPOT (its mean gap) is within the ITL limit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.serve.records import RequestRecord

CLIENT_CPU_SHARE_MAX = 0.2


@dataclass(frozen=True)
class Slo:
    """Limits of one request, in ms; `None` is no limit."""

    ttft_ms: float | None = None
    itl_ms: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether any limit is given."""
        return self.ttft_ms is not None or self.itl_ms is not None

    def is_met_by(self, record: RequestRecord) -> bool:
        """Whether a successful request stayed within each limit; a figure it does not have (one token, say) breaks none."""
        is_ttft_met = self.ttft_ms is None or record.ttft_ms is None or record.ttft_ms <= self.ttft_ms
        is_itl_met = self.itl_ms is None or record.tpot_ms is None or record.tpot_ms <= self.itl_ms
        return is_ttft_met and is_itl_met


@dataclass(frozen=True)
class Distribution:
    """A sample's size, mean, percentiles and maximum, in the sample's unit."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class Summary:
    """The figures of one load level; a distribution is `None` when it has no sample."""

    num_requests: int
    num_ok: int
    errors: dict[str, int]
    wall_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float | None
    goodput_requests_per_s: float | None
    num_output_tokens: int
    output_tokens_from: str
    num_output_chunks: int
    prompt_tokens: Distribution | None
    num_cached_tokens: int | None
    ttft_ms: Distribution | None
    itl_ms: Distribution | None
    tpot_ms: Distribution | None
    e2e_ms: Distribution | None
    late_ms: Distribution | None
    client_cpu_share: float
    is_suspect: bool

    def as_json(self) -> dict[str, Any]:
        """The summary for the result file."""
        return asdict(self)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile (0 to 100) of an ascending, non-empty sample, as defined in the module's docstring."""
    if not ordered:
        raise ValueError("a percentile needs at least one sample")
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def distribution(values: Iterable[float | None]) -> Distribution | None:
    """Describe the samples that are there; `None` when none is."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    return Distribution(
        count=len(ordered),
        mean=math.fsum(ordered) / len(ordered),
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p99=percentile(ordered, 99),
        max=ordered[-1],
    )


def _token_source(ok: Sequence[RequestRecord]) -> str:
    sources = {"chunks" if record.usage_output_tokens is None else "usage" for record in ok}
    return sources.pop() if len(sources) == 1 else "mixed" if sources else "none"


def _sum_if_all(values: Iterable[int | None]) -> int | None:
    present = list(values)
    return None if not present or None in present else sum(value for value in present if value is not None)


def summarize(records: Sequence[RequestRecord], *, client_cpu_s: float, slo: Slo) -> Summary:
    """Reduce the records of one level to its figures.

    Args:
        records: Every request of the level, failed ones too; at least one.
        client_cpu_s: CPU time that the client's process used during the level.
        slo: Limits for goodput.
    """
    if not records:
        raise ValueError("a summary needs at least one request")
    ok = [record for record in records if record.is_ok]
    wall_s = (max(record.ended_ns for record in records) - min(record.started_ns for record in records)) / 1e9
    num_output_tokens = sum(record.num_output_tokens for record in ok)
    num_prompt_tokens = _sum_if_all(record.usage_prompt_tokens for record in ok)
    # A level that takes no measurable time (all requests refused at once) has no rates to speak of.
    per_s = 1 / wall_s if wall_s > 0 else 0.0
    cpu_share = client_cpu_s * per_s
    return Summary(
        num_requests=len(records),
        num_ok=len(ok),
        errors=dict(Counter(record.error_kind for record in records if record.error_kind is not None)),
        wall_s=wall_s,
        requests_per_s=len(ok) * per_s,
        output_tokens_per_s=num_output_tokens * per_s,
        total_tokens_per_s=None if num_prompt_tokens is None else (num_prompt_tokens + num_output_tokens) * per_s,
        goodput_requests_per_s=sum(slo.is_met_by(record) for record in ok) * per_s if slo.is_set else None,
        num_output_tokens=num_output_tokens,
        output_tokens_from=_token_source(ok),
        num_output_chunks=sum(len(record.chunk_times_ns) for record in ok),
        prompt_tokens=distribution(record.usage_prompt_tokens for record in ok),
        num_cached_tokens=_sum_if_all(record.usage_cached_tokens for record in ok),
        ttft_ms=distribution(record.ttft_ms for record in ok),
        itl_ms=distribution(gap for record in ok for gap in record.itl_ms),
        tpot_ms=distribution(record.tpot_ms for record in ok),
        e2e_ms=distribution(record.e2e_ms for record in ok),
        late_ms=distribution(record.late_ns / 1e6 for record in records),
        client_cpu_share=cpu_share,
        is_suspect=cpu_share > CLIENT_CPU_SHARE_MAX,
    )
