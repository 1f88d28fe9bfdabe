"""The figures of simulated runs as a table, as JSON and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bench.simulate.engine import Outcome

_LINE_STYLES = ("-", "--", ":", "-.")


def _percentiles(values: Any, *, scale: float = 1.0) -> list[float] | None:
    if not len(values):
        return None
    return [round(float(one) * scale, 4) for one in np.percentile(np.frombuffer(values), (50, 90, 99))]


def _gaps(outcome: Outcome) -> list[float] | None:
    gaps = [outcome.gaps.percentile(percent) for percent in (50, 90, 99)]
    return [round(gap * 1e3, 4) for gap in gaps if gap is not None] or None


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The figures; percentiles are p50, p90, p99."""
    return {
        "ttft_s": _percentiles(outcome.ttft_s),
        "itl_ms": _percentiles(outcome.itl_s, scale=1e3),
        "gap_ms": _gaps(outcome),
        "e2e_s": _percentiles(outcome.e2e_s),
        "output_tokens_per_s": round(outcome.output_tokens_per_s, 1),
        "hit_rate": round(outcome.hit_rate, 4),
        "fairness": None if outcome.fairness is None else round(outcome.fairness, 3),
        "num_requests": outcome.num_requests,
        "num_finished": len(outcome.e2e_s),
        "num_rejected": outcome.num_rejected,
        "num_failed": outcome.num_failed,
        "num_preemptions": outcome.num_preemptions,
        "num_requeued": outcome.num_requeued,
        "num_held": outcome.num_held,
        "num_steps": outcome.num_steps,
        "num_limited_steps": outcome.num_limited_steps,
        "max_waiting": outcome.max_waiting,
        "busy_share": round(outcome.busy_share, 4),
        "simulated_s": round(outcome.simulated_s, 3),
        "delayer": outcome.delayer,
        "wall_s": round(outcome.wall_s, 3),
        "core_s": round(outcome.core_s, 3),
    }


def table(outcomes: dict[str, Outcome]) -> Table:
    """One column a run."""
    shown = Table(title="percentiles: p50 / p90 / p99")
    shown.add_column("")
    for name in outcomes:
        shown.add_column(name, justify="right", no_wrap=True)
    figures = [as_json(outcome) for outcome in outcomes.values()]
    for key in figures[0]:
        shown.add_row(key, *(_cell(figure[key]) for figure in figures))
    return shown


def _cell(value: Any) -> str:
    if value is None or value == {}:
        return "-"
    if isinstance(value, list):
        return " / ".join(f"{one:g}" for one in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def draw(outcomes: dict[str, Outcome], path: Path) -> None:
    """Six panels into a PNG, one line a run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(2, 3, figsize=(17, 9), constrained_layout=True)
    ((ttft, itl, queue), (hits, served, usage)) = axes
    preemptions = usage.twinx()
    preemptions.set_ylabel("preemptions so far (dotted)")
    preemptions.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    preemptions.set_visible(any(outcome.num_preemptions for outcome in outcomes.values()))
    for index, (name, outcome) in enumerate(outcomes.items()):
        line, color = outcome.timeline, f"C{index}"
        _cdf(ttft, outcome.ttft_s, name, scale=1)
        _cdf(itl, outcome.itl_s, name, scale=1e3)
        queue.plot(line.seconds, line.num_waiting, color=color, label=f"{name}: waiting")
        queue.plot(line.seconds, line.num_running, color=color, linestyle="--", label=f"{name}: running")
        share = np.array(line.num_cached_tokens) / np.maximum(1, line.num_prompt_tokens)
        hits.plot(line.seconds, share, label=name)
        for number, (tenant, counts) in enumerate(line.served.items()):
            label = f"{name}: {tenant}" if tenant else name
            served.plot(line.seconds, counts, color=color, linestyle=_LINE_STYLES[number % len(_LINE_STYLES)], label=label)
        usage.plot(line.seconds, line.kv_usage, color=color, label=name)
        if outcome.num_preemptions:
            preemptions.plot(line.seconds, line.num_preemptions, color=color, linestyle=":")
    for axis, title, x_label, y_label in (
        (ttft, "Time to first token", "seconds", "share of requests"),
        (itl, "Time per output token", "ms", "share of requests"),
        (queue, "Waiting and running", "simulated seconds", "requests"),
        (hits, "Prompt tokens from the cache", "simulated seconds", "share so far"),
        (served, "Tokens served (output counted twice)", "simulated seconds", "tokens"),
        (usage, "KV pages held by running sequences", "simulated seconds", "share, mean over lanes"),
    ):
        axis.set_title(title)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.grid(visible=True, alpha=0.3)
        axis.legend(fontsize="small")
    for axis in (ttft, itl):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(ticker.FuncFormatter(_minor_label))
        axis.tick_params(axis="x", which="minor", labelsize=7)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _minor_label(value: float, _: object) -> str:
    """Of a logarithmic axis only 2 and 5 are labelled between the powers of ten; more would run into each other."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _cdf(axis: Any, values: Any, name: str, *, scale: float) -> None:
    if len(values):
        ordered = np.sort(np.frombuffer(values)) * scale
        axis.plot(np.maximum(ordered, 1e-4), np.linspace(0, 1, len(ordered)), label=name)
