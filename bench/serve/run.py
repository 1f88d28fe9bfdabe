"""One benchmark run: probe the prompt length, warm up, then measure each load level in turn.

Uses the clock and the client; what to send comes from `prompts`, what it means from `summary`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, replace
from typing import Any

import aiohttp

from bench.serve import prompts
from bench.serve.client import LoadClient, open_session
from bench.serve.openai_stream import Endpoint, Sampling
from bench.serve.records import RequestRecord, RequestSpec
from bench.serve.summary import Slo, Summary, summarize
from bench.serve.worker_gap import WorkerMetricsError, WorkerTimes, read_worker_times

_PROBES_MAX = 3


class ProbeError(RuntimeError):
    """The endpoint did not answer the first request; nothing was measured."""


@dataclass(frozen=True)
class Plan:
    """What one run does.

    Exactly one of `concurrencies` (closed loop) and `rates_per_s` (open loop) is non-empty; each entry is one level of
    `num_requests` requests. `dataset` empty means random prompts of `num_prompt_tokens`.
    """

    base_url: str
    endpoint: Endpoint
    sampling: Sampling
    concurrencies: tuple[int, ...]
    rates_per_s: tuple[float, ...]
    num_requests: int
    num_warmup_requests: int
    num_prompt_tokens: int
    num_shared_prefix_tokens: int
    num_output_tokens: int
    dataset: tuple[RequestSpec, ...]
    seed: int
    slo: Slo
    timeout_s: float
    api_key: str | None = None
    new_connections: bool = False
    worker_metrics_url: str | None = None


@dataclass(frozen=True)
class PromptFit:
    """How long random prompts are: words in each, and the tokens that the server counted for as many (`None`: not known)."""

    num_words: int
    num_tokens: int | None


@dataclass(frozen=True)
class Level:
    """One measured level: its name, its records and its figures, and the worker's times where they were asked for."""

    name: str
    records: list[RequestRecord]
    summary: Summary
    worker: WorkerTimes | None = None

    def as_json(self) -> dict[str, Any]:
        """The level for the result file."""
        origin_ns = min(record.started_ns for record in self.records)
        requests = [record.as_json(origin_ns=origin_ns) for record in self.records]
        worker = asdict(self.worker) if self.worker is not None else None
        return {"name": self.name, "summary": self.summary.as_json(), "worker": worker, "requests": requests}


@dataclass(frozen=True)
class Outcome:
    """All levels of a run, and the fit of its random prompts (`None` for a data set)."""

    levels: list[Level]
    prompt_fit: PromptFit | None

    @property
    def num_failed(self) -> int:
        """Failed requests over all levels."""
        return sum(level.summary.num_requests - level.summary.num_ok for level in self.levels)

    @property
    def num_ok(self) -> int:
        """Successful requests over all levels."""
        return sum(level.summary.num_ok for level in self.levels)


async def execute(plan: Plan, *, on_progress: Callable[[str], None]) -> Outcome:
    """Carry out the plan.

    Raises:
        ProbeError: The endpoint refused or failed the probe.
        WorkerMetricsError: The worker's metrics were asked for and cannot be read.
    """
    session_options = {"api_key": plan.api_key, "timeout_s": plan.timeout_s, "new_connections": plan.new_connections}
    async with open_session(**session_options) as session:  # type: ignore[arg-type]
        client = LoadClient(session, base_url=plan.base_url, endpoint=plan.endpoint, sampling=plan.sampling)
        fit = None if plan.dataset else await _fit_prompts(client, plan)
        num_words = fit.num_words if fit else 0
        if plan.num_warmup_requests:
            on_progress(f"warm-up: {plan.num_warmup_requests} requests")
            warmup = _specs(plan, "warmup", num_words=num_words, num_requests=plan.num_warmup_requests)
            warmed = await client.run_closed(warmup, concurrency=max(plan.concurrencies, default=1))
            for record in warmed:
                if not record.is_ok:
                    on_progress(f"a warm-up request failed: {record.error_kind}: {record.error_message}")
        levels = []
        watch = _WorkerWatch(session, plan.worker_metrics_url)
        for concurrency in plan.concurrencies:
            name = f"concurrency {concurrency}"
            on_progress(f"{name}: {plan.num_requests} requests")
            measuring = _measure_closed(client, plan, name, num_words=num_words, concurrency=concurrency)
            levels.append(await watch.over(measuring))
        for rate_per_s in plan.rates_per_s:
            name = f"rate {rate_per_s:g}/s"
            on_progress(f"{name}: {plan.num_requests} requests")
            levels.append(await watch.over(_measure_open(client, plan, name, num_words=num_words, rate_per_s=rate_per_s)))
    return Outcome(levels=levels, prompt_fit=fit)


class _WorkerWatch:
    """Looks at a worker's times before and after each level; does nothing without a URL."""

    def __init__(self, session: aiohttp.ClientSession, url: str | None) -> None:
        self._session = session
        self._url = url

    async def over(self, measuring: Coroutine[Any, Any, Level]) -> Level:
        """Measure a level and add the worker's times of it."""
        if self._url is None:
            return await measuring
        try:
            before = await read_worker_times(self._session, self._url)
        except WorkerMetricsError:
            measuring.close()
            raise
        level = await measuring
        return replace(level, worker=(await read_worker_times(self._session, self._url)).since(before))


async def _measure_closed(client: LoadClient, plan: Plan, name: str, *, num_words: int, concurrency: int) -> Level:
    specs = _specs(plan, name, num_words=num_words, num_requests=plan.num_requests)
    cpu_start_s = time.process_time()
    records = await client.run_closed(specs, concurrency=concurrency)
    cpu_s = time.process_time() - cpu_start_s
    return Level(name=name, records=records, summary=summarize(records, client_cpu_s=cpu_s, slo=plan.slo))


async def _measure_open(client: LoadClient, plan: Plan, name: str, *, num_words: int, rate_per_s: float) -> Level:
    specs = _specs(plan, name, num_words=num_words, num_requests=plan.num_requests)
    offsets_ns = prompts.poisson_offsets_ns(rate_per_s=rate_per_s, num_requests=plan.num_requests, seed=plan.seed)
    cpu_start_s = time.process_time()
    records = await client.run_open(specs, offsets_ns=offsets_ns)
    cpu_s = time.process_time() - cpu_start_s
    return Level(name=name, records=records, summary=summarize(records, client_cpu_s=cpu_s, slo=plan.slo))


async def _fit_prompts(client: LoadClient, plan: Plan) -> PromptFit:
    """Ask the server how many tokens a prompt has, and correct the number of words until it is the wanted one."""
    num_words = plan.num_prompt_tokens
    for attempt in range(_PROBES_MAX):
        text = prompts.random_prompt(seed=plan.seed, level="probe", index=attempt, num_words=num_words)
        record = await client.send(RequestSpec(index=attempt, prompt=text, num_output_tokens=1))
        if not record.is_ok:
            raise ProbeError(f"{record.error_kind}: {record.error_message}")
        measured = record.usage_prompt_tokens
        if measured is None:
            return PromptFit(num_words=num_words, num_tokens=None)
        fitted = prompts.fit(num_words=num_words, measured_tokens=measured, wanted_tokens=plan.num_prompt_tokens)
        if fitted == num_words:
            break
        # After the last probe the corrected length is kept unasked; what each request really had is in its own record.
        num_words, measured = fitted, None
    return PromptFit(num_words=num_words, num_tokens=measured)


def _specs(plan: Plan, level: str, *, num_words: int, num_requests: int) -> list[RequestSpec]:
    if plan.dataset:
        return prompts.cycle_dataset(plan.dataset, num_requests)
    num_shared_words = min(plan.num_shared_prefix_tokens, num_words)
    return [
        RequestSpec(
            index=index,
            prompt=prompts.random_prompt(
                seed=plan.seed, level=level, index=index, num_words=num_words, num_shared_words=num_shared_words
            ),
            num_output_tokens=plan.num_output_tokens,
        )
        for index in range(num_requests)
    ]
