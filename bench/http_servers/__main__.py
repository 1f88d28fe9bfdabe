"""Measure the candidates for the router's HTTP server: `python -m bench.http_servers`.

Each candidate runs in its own process; this process is the load client. The main figure is the server's CPU time a request
and a chunk, which other load on the machine disturbs least. The decision taken from it is docs/decisions/0001-http-server.md.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import orjson
import uvloop
from rich.console import Console
from rich.table import Table

from bench.http_servers.behaviour import probe_disconnect, probe_drain, probe_never_reads, probe_upload
from bench.http_servers.load import fetch_stats, measure_echo, measure_streams
from bench.machine import provenance

CANDIDATE_NAMES = ("uvicorn", "granian", "aiohttp")


@contextlib.contextmanager
def _running(name: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    process = subprocess.Popen([sys.executable, "-m", "bench.http_servers.server", name], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        _wait_until_serving(port)
        yield port, process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _wait_until_serving(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            fetch_stats(port)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _median_of(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}


async def _measure_speed(port: int, *, repeats: int) -> dict[str, Any]:
    await measure_echo(port, num_requests=1000, num_connections=32)
    echo, saturated, paced = [], [], []
    for _ in range(repeats):
        echo.append(await measure_echo(port, num_requests=10_000, num_connections=32))
        saturated.append(await measure_streams(port, num_streams=64, num_rounds=500, interval_us=0))
        paced.append(await measure_streams(port, num_streams=64, num_rounds=150, interval_us=20_000))
    return {"json": _median_of(echo), "sse_saturated": _median_of(saturated), "sse_paced": _median_of(paced)}


def _measure_candidate(name: str, *, repeats: int) -> dict[str, Any]:
    with _running(name) as (port, _):
        speed = uvloop.run(_measure_speed(port, repeats=repeats))
    with _running(name) as (port, process):
        behaviour = {
            "disconnect_idle": probe_disconnect(port, busy=False),
            "disconnect_busy": probe_disconnect(port, busy=True),
            "upload_declared": probe_upload(port, declared=True),
            "upload_chunked": probe_upload(port, declared=False),
            "never_reads": probe_never_reads(port),
            "drain": probe_drain(port, process),
        }
    return speed | behaviour


def _rows(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows: dict[str, list[str]] = {}
    for result in results.values():
        for group, figures in result.items():
            for key, value in figures.items():
                shown = f"{value:,.2f}" if isinstance(value, float) else str(value)
                rows.setdefault(f"{group} {key}", []).append(shown)
    return [[label, *values] for label, values in rows.items()]


@click.command()
@click.option("--repeats", default=5, show_default=True, help="Runs of each workload; the median is reported.")
@click.option("--only", multiple=True, type=click.Choice(CANDIDATE_NAMES), help="Measure only this candidate.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results/http_servers.json"), show_default=True)
def main(repeats: int, only: tuple[str, ...], out: Path) -> None:
    """Measure each candidate, print one table, write the figures as JSON."""
    results = {name: _measure_candidate(name, repeats=repeats) for name in only or CANDIDATE_NAMES}
    table = Table(title="HTTP servers for the router")
    table.add_column("figure")
    for name in results:
        table.add_column(name, justify="right")
    for row in _rows(results):
        table.add_row(*row)
    # Without a terminal rich assumes 80 columns, which would fold every label.
    Console(width=max(120, Console().width)).print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(orjson.dumps({"provenance": provenance(), "repeats": repeats, "results": results}, option=orjson.OPT_INDENT_2))
    click.echo(f"written: {out}")


if __name__ == "__main__":
    main()
