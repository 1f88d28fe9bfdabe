"""How a run is shown: the result file's JSON, the table, and the remarks that keep a reader from misreading them. Pure."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from bench.serve.run import Level, Outcome, Plan
from bench.serve.summary import CLIENT_CPU_SHARE_MAX, Distribution

SCHEMA = "headrace.bench.serve/1"


def remarks(plan: Plan, outcome: Outcome) -> list[str]:
    """Sentences that belong beside the figures."""
    found = []
    fit = outcome.prompt_fit
    if fit is not None and fit.num_tokens is None:
        found.append(f"prompts are {fit.num_words} random words; the probe gave no count of tokens for that length")
    elif fit is not None:
        template = " (the chat template's own tokens included)" if plan.endpoint == "chat" else ""
        found.append(f"prompts are {fit.num_words} random words, which the server counts as {fit.num_tokens} tokens{template}")
        if fit.num_tokens != plan.num_prompt_tokens:
            found.append(f"{plan.num_prompt_tokens} prompt tokens were asked for and could not be met")
    for level in outcome.levels:
        found += _level_remarks(plan, level)
    return found


def _level_remarks(plan: Plan, level: Level) -> list[str]:
    summary, found = level.summary, []
    if summary.output_tokens_from in ("chunks", "mixed"):
        found.append("output tokens are counted by streamed chunks: the server sent no usage")
    elif summary.num_output_chunks < summary.num_output_tokens:
        found.append(
            f"{summary.num_output_tokens} tokens came in {summary.num_output_chunks} chunks: ITL is the gap between chunks"
        )
    num_short = sum(record.is_ok and record.finish_reason not in ("length", None) for record in level.records)
    if num_short:
        found.append(f"{num_short} requests ended by themselves before the asked number of output tokens (see --ignore-eos)")
    if summary.num_cached_tokens:
        found.append(f"{summary.num_cached_tokens} prompt tokens came from the server's prefix cache")
    if level.worker is not None:
        worker = level.worker
        gap_ms = 1e3 * worker.idle_s / max(1, worker.num_steps)
        found.append(
            f"the worker was idle for {worker.idle_share:.2%} of its time while it held sequences: {gap_ms:.2f} ms before each of "
            f"{worker.num_steps} steps on average"
        )
    if summary.is_suspect:
        found.append(
            f"the client used {summary.client_cpu_share:.0%} of a core (over {CLIENT_CPU_SHARE_MAX:.0%}): the figures are suspect"
        )
    found += [f"{count} requests failed: {kind}: {_example(level, kind)}" for kind, count in summary.errors.items()]
    return [f"{level.name}: {remark}" for remark in found]


def _example(level: Level, kind: str) -> str:
    return next(record.error_message for record in level.records if record.error_kind == kind)


def as_json(plan: Plan, outcome: Outcome, *, provenance: dict[str, Any]) -> dict[str, Any]:
    """The whole result. The machine in `provenance` is the client's; the API key is nowhere in it."""
    return {
        "schema": SCHEMA,
        "provenance": provenance,
        "workload": {
            "base_url": plan.base_url,
            "endpoint": str(plan.endpoint),
            "model": plan.sampling.model,
            "temperature": plan.sampling.temperature,
            "ignore_eos": plan.sampling.ignore_eos,
            "num_requests": plan.num_requests,
            "num_warmup_requests": plan.num_warmup_requests,
            "dataset": f"{len(plan.dataset)} lines" if plan.dataset else "random",
            "num_prompt_tokens": None if plan.dataset else plan.num_prompt_tokens,
            "num_prompt_words": outcome.prompt_fit.num_words if outcome.prompt_fit else None,
            "num_shared_prefix_tokens": plan.num_shared_prefix_tokens,
            "num_output_tokens": plan.num_output_tokens,
            "seed": plan.seed,
            "slo_ttft_ms": plan.slo.ttft_ms,
            "slo_itl_ms": plan.slo.itl_ms,
            "new_connections": plan.new_connections,
        },
        "remarks": remarks(plan, outcome),
        "levels": [level.as_json() for level in outcome.levels],
    }


def table(outcome: Outcome) -> Table:
    """One row a level; the three numbers of a latency are p50, p90 and p99, in ms."""
    shown = Table(title="latencies in ms: p50 / p90 / p99")
    for header in ("load", "ok", "req/s", "out tok/s", "TTFT", "ITL", "TPOT", "e2e", "goodput/s", "client CPU"):
        shown.add_column(header, justify="left" if header == "load" else "right", no_wrap=True)
    for level in outcome.levels:
        summary = level.summary
        shown.add_row(
            level.name,
            f"{summary.num_ok}/{summary.num_requests}",
            f"{summary.requests_per_s:.2f}",
            f"{summary.output_tokens_per_s:.1f}",
            _percentiles(summary.ttft_ms),
            _percentiles(summary.itl_ms),
            _percentiles(summary.tpot_ms),
            _percentiles(summary.e2e_ms),
            "-" if summary.goodput_requests_per_s is None else f"{summary.goodput_requests_per_s:.2f}",
            f"{summary.client_cpu_share:.1%}",
        )
    return shown


def _percentiles(sample: Distribution | None) -> str:
    return "-" if sample is None else f"{sample.p50:.1f} / {sample.p90:.1f} / {sample.p99:.1f}"
