"""Comparisons from measurements: ratios of ours to each peer, pair by pair, and the table. Pure.

A pair is one measurement of ours and one of a peer, one straight after the other, with the same prompts. A ratio is ours / peer:
above 1 is better for tokens a second, below 1 for times and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from bench.peers.servers import OURS
from bench.peers.workloads import WORKLOADS

SCHEMA = "headrace.bench.peers/1"
IN_PROCESS = " (in process)"

_HOW_TO_READ = (
    "A figure is the median of its measurements. A ratio is ours / peer, the median of the pairs, with the smallest and largest in "
    "brackets: above 1 is better for tokens a second, below 1 for the rest."
)

Measurement = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """One column: where its value is in a measurement, and how it is shown."""

    name: str
    read: Callable[[Measurement], float | None]
    digits: int = 0


def _percentile(distribution: str, percentile: str) -> Callable[[Measurement], float | None]:
    def read(measurement: Measurement) -> float | None:
        found = measurement["summary"][distribution]
        return None if found is None else float(found[percentile])

    return read


METRICS = (
    Metric("TTFT p50 ms", _percentile("ttft_ms", "p50")),
    Metric("TTFT p99 ms", _percentile("ttft_ms", "p99")),
    Metric("ITL p50 ms", _percentile("itl_ms", "p50"), digits=1),
    Metric("TPOT p50 ms", _percentile("tpot_ms", "p50"), digits=1),
    Metric("out tok/s", lambda measurement: float(measurement["summary"]["output_tokens_per_s"])),
    Metric("peak PSS MiB", lambda measurement: float(measurement["memory"]["peak_pss_mib"])),
    Metric("peak RSS MiB", lambda measurement: float(measurement["memory"]["peak_rss_mib"])),
)
COMPARED = ("out tok/s", "TTFT p50 ms", "TTFT p99 ms", "ITL p50 ms", "peak PSS MiB")
_BY_NAME = {metric.name: metric for metric in METRICS}


@dataclass(frozen=True)
class Ratio:
    """Ours / peer of one metric, over all pairs of a workload."""

    workload: str
    peer: str
    metric: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the pairs."""
        return median(self.values)

    def as_json(self) -> dict[str, Any]:
        """For the result file."""
        return asdict(self) | {"median": self.median, "min": min(self.values), "max": max(self.values)}


def label(measurement: Measurement) -> str:
    """The server's name as it is shown."""
    return str(measurement["server"]) + (IN_PROCESS if measurement["is_in_process"] else "")


def is_whole(measurement: Measurement) -> bool:
    """Whether every request of it ended well; only such ones are compared."""
    return "error" not in measurement and measurement["summary"]["num_ok"] == measurement["summary"]["num_requests"]


def ratios(measurements: Sequence[Measurement]) -> list[Ratio]:
    """Every ratio that the pairs give."""
    ours = {_pair(each): each for each in measurements if each["server"] == OURS and is_whole(each)}
    found: dict[tuple[str, str, str], list[float]] = {}
    for measurement in measurements:
        if measurement["server"] == OURS or not is_whole(measurement) or _pair(measurement) not in ours:
            continue
        for name in COMPARED:
            mine, theirs = _BY_NAME[name].read(ours[_pair(measurement)]), _BY_NAME[name].read(measurement)
            if mine is not None and theirs:
                found.setdefault((measurement["workload"], label(measurement), name), []).append(mine / theirs)
    return [Ratio(workload, peer, name, tuple(values)) for (workload, peer, name), values in found.items()]


def _pair(measurement: Measurement) -> tuple[Any, ...]:
    return measurement["workload"], measurement["round"], measurement["pair"]


def as_json(
    measurements: Sequence[Measurement], *, provenance: Mapping[str, Any], servers: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole result."""
    return {
        "schema": SCHEMA,
        "provenance": provenance,
        "settings": settings,
        "servers": servers,
        "measurements": list(measurements),
        "ratios": [ratio.as_json() for ratio in ratios(measurements)],
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The result as Markdown: a table a workload, then what must be known beside it."""
    measurements = result["measurements"]
    names = [name for name in WORKLOADS if any(each["workload"] == name for each in measurements)]
    parts = [_heading(result)]
    for name in names:
        parts.append(_table(name, [each for each in measurements if each["workload"] == name]))
    parts.append(_ratio_table(ratios(measurements)))
    remarks = _remarks(measurements)
    if remarks:
        parts.append("\n".join(["Remarks:", *(f"- {remark}" for remark in remarks)]))
    return "\n\n".join(parts) + "\n"


def _heading(result: Mapping[str, Any]) -> str:
    machine = result["provenance"]
    settings = result["settings"]
    lines = [
        f"{machine['cpu_model']}, {machine['num_cores']} cores; commit {machine['commit']}; {machine['date']}; "
        f"{settings['rounds']} rounds, scale {settings['scale']:g}. {_HOW_TO_READ}",
        "",
        "| server | ready after s | PSS MiB when ready | weights and settings |",
        "|---|---|---|---|",
    ]
    for name, server in result["servers"].items():
        lines.append(f"| {name} | {server['ready_s']:.1f} | {server['memory_ready']['pss_mib']:.0f} | {server['about']} |")
    return "\n".join(lines)


def _table(workload: str, measurements: Sequence[Measurement]) -> str:
    heads = ["server", "requests", "prompt tokens", *(metric.name for metric in METRICS)]
    lines = [f"**{workload}**: {WORKLOADS[workload].title}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in _in_order(label(measurement) for measurement in measurements):
        own = [each for each in measurements if label(each) == name and is_whole(each)]
        if not own:
            lines.append(f"| {name} | failed |" + " |" * (len(heads) - 2))
            continue
        cells = [name, str(own[0]["summary"]["num_requests"]), f"{median(_prompt_tokens(each) for each in own):.0f}"]
        cells += [_cell(metric, own) for metric in METRICS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio_table(found: Sequence[Ratio]) -> str:
    heads = ["ours / peer", "", *COMPARED]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    compared = {(ratio.workload, ratio.peer, ratio.metric): ratio for ratio in found}
    for workload, peer in dict.fromkeys((ratio.workload, ratio.peer) for ratio in found):
        cells = [workload, peer, *(_ratio_cell(compared.get((workload, peer, name))) for name in COMPARED)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _in_order(names: Iterable[str]) -> list[str]:
    """Each name once, ours first."""
    return sorted(dict.fromkeys(names), key=lambda name: name != OURS)


def _prompt_tokens(measurement: Measurement) -> float:
    found = measurement["summary"]["prompt_tokens"]
    return 0.0 if found is None else float(found["mean"])


def _cell(metric: Metric, measurements: Sequence[Measurement]) -> str:
    values = [value for value in map(metric.read, measurements) if value is not None]
    return f"{median(values):.{metric.digits}f}" if values else "-"


def _ratio_cell(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio.median:.2f} ({min(ratio.values):.2f}–{max(ratio.values):.2f})"


def _remarks(measurements: Sequence[Measurement]) -> list[str]:
    """The first remark of each kind that a server got on a workload, with how many of its measurements got one like it."""
    found: dict[str, list[str]] = {}
    for each in measurements:
        for remark in [each["error"]] if "error" in each else each["remarks"]:
            kind = remark.partition(":")[0]
            found.setdefault(f"{each['workload']} {label(each)}: {kind}", []).append(f"{each['workload']} {label(each)}: {remark}")
    lines = [f"{same[0]}{f' (and {len(same) - 1} more like it)' if len(same) > 1 else ''}" for same in found.values()]
    shares = [each["repeated_share"] for each in measurements if each.get("repeated_share") is not None]
    if shares:
        lines.append(f"W6: {min(shares):.0%} to {max(shares):.0%} of an output could be told from the 3 tokens before each")
    return lines
