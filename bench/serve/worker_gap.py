"""How long a worker sat idle between steps, from its own timestamps: its `/metrics` page before and after a level."""

from __future__ import annotations

from dataclasses import dataclass

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

_IDLE = "headrace_worker_idle_seconds_total"
_BUSY = "headrace_worker_step_seconds_sum"
_STEPS = "headrace_worker_steps_total"


class WorkerMetricsError(RuntimeError):
    """The page cannot be read, or is not a worker's."""


@dataclass(frozen=True)
class WorkerTimes:
    """Sums over a worker's steps, or over those between two looks."""

    idle_s: float
    busy_s: float
    num_steps: int

    @property
    def idle_share(self) -> float:
        """Share of the time in which sequences were held and none was computed."""
        total_s = self.idle_s + self.busy_s
        return self.idle_s / total_s if total_s else 0.0

    def since(self, earlier: WorkerTimes) -> WorkerTimes:
        """What was added."""
        return WorkerTimes(self.idle_s - earlier.idle_s, self.busy_s - earlier.busy_s, self.num_steps - earlier.num_steps)


def parse_worker_times(page: str) -> WorkerTimes:
    """Read the sums from a metrics page.

    Raises:
        WorkerMetricsError: One is missing.
    """
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name in (_IDLE, _BUSY, _STEPS)
    }
    if missing := {_IDLE, _BUSY, _STEPS} - values.keys():
        raise WorkerMetricsError(f"no {', '.join(sorted(missing))} on the page: is it a worker's?")
    return WorkerTimes(values[_IDLE], values[_BUSY], int(values[_STEPS]))


async def read_worker_times(session: aiohttp.ClientSession, url: str) -> WorkerTimes:
    """Fetch and read a metrics page.

    Raises:
        WorkerMetricsError: It cannot be had.
    """
    try:
        async with session.get(url) as response:
            response.raise_for_status()
            return parse_worker_times(await response.text())
    except (aiohttp.ClientError, TimeoutError) as error:
        raise WorkerMetricsError(f"{url}: {error}") from error
