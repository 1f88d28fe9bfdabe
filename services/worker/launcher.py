"""The launcher of a worker group: starts one process a rank, passes their states on, and lives and dies with them.

It computes nothing and opens no link: rank 0 dials the scheduler itself. Ranks are never restarted one by one: their collectives
and KV pages belong together, so the end of one is the end of the group, and whoever supervises the launcher starts a new one.
Nothing is served until the ranks run, so this imports no more than it needs to start them.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final, cast

from headrace.config.load import FILE_ENV, load_settings
from headrace.config.load import Settings as SettingsTree
from headrace.errors import ConfigError
from headrace.lifecycle import State
from headrace.supervision.child import STANDBY_VARIABLE, Notifier, attach
from headrace.supervision.limits import ProcessSpec, SupervisionLimits
from headrace.supervision.supervisor import Supervisor
from headrace.telemetry import logs
from services.worker import machine
from services.worker.config import Settings

RANK_MODULE: Final = "services.worker.rank"
NUM_RANKS_MAX: Final = 1

_DRAIN_SHARE: Final = 0.95
_ANY_TIME_S: Final = 1e9


def launch() -> int:
    """Run a worker group until it is told to stop, or one of its ranks ends.

    Returns:
        The exit status: 0 after a stop that was asked for, 2 for a wrong setting or model, else what ended the group.
    """
    attachment = attach()
    try:
        file = os.environ.get(FILE_ENV)
        tree = load_settings(file=Path(file) if file else None, environment=os.environ)
        settings = cast(Settings, tree.sections["worker"])
        check_num_ranks(settings.num_ranks)
    except ConfigError as error:
        attachment.notifier.state(State.FAILED, error.message)
        print(f"headrace worker: {error.message}", file=sys.stderr)
        return 2
    logs.configure(
        service="worker-launcher", instance=tree.instance, level=tree.telemetry.log_level, output=tree.telemetry.log_output
    )
    specs = rank_specs(tree, settings, standby_fd=attachment.standby_fd)
    return asyncio.run(_supervise(specs, tree, attachment.notifier))


def check_num_ranks(num_ranks: int) -> None:
    """Refuse a group larger than can be run.

    Raises:
        ConfigError: Names the limit.
    """
    if num_ranks > NUM_RANKS_MAX:
        raise ConfigError(
            f"worker.num_ranks is {num_ranks}; at most {NUM_RANKS_MAX} is supported: for more throughput, run more workers",
            param="worker.num_ranks",
        )


def rank_specs(tree: SettingsTree, settings: Settings, *, standby_fd: int | None) -> list[ProcessSpec]:
    """The processes of the group, in order of rank. In a group that stands by, it is the ranks that wait for its turn."""
    supervision = tree.supervision
    environment = thread_environment(num_compute_threads(settings), os.environ)
    if standby_fd is not None:
        environment[STANDBY_VARIABLE] = str(standby_fd)
    return [
        ProcessSpec(
            name=f"rank-{rank}",
            argv=(sys.executable, "-m", RANK_MODULE),
            env=environment,
            pass_fds=() if standby_fd is None else (standby_fd,),
            # From the turn on, whoever supervises the launcher counts.
            start_timeout_s=None if standby_fd is None else _ANY_TIME_S,
            stall_timeout_s=supervision.stall_timeout_s,
            restart="never",
            # The launcher's own supervisor counts the same seconds from the same moment.
            drain_deadline_s=supervision.drain_deadline_s * _DRAIN_SHARE,
        )
        for rank in range(settings.num_ranks)
    ]


def num_compute_threads(settings: Settings) -> int:
    """Threads that compute: one a physical core where nothing is set."""
    return machine.num_usable_cores() if settings.num_threads == "auto" else settings.num_threads


def thread_environment(num_threads: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What the OpenMP runtime of a rank must know before it is loaded; what the user set already is left alone.

    A thread that waits at a barrier spins for a moment (the gaps between the parallel parts of a step are some ten microseconds)
    and then sleeps: spinning on, as the runtimes do by default, takes the core from the services that share it.
    """
    wanted = {
        "OMP_NUM_THREADS": str(num_threads),
        # GNU's runtime, which torch's own wheels carry: spins, about 0.1 ms.
        "GOMP_SPINCOUNT": "10000",
        # LLVM's and Intel's runtime: milliseconds.
        "KMP_BLOCKTIME": "1",
    }
    return {name: value for name, value in wanted.items() if name not in environment}


async def _supervise(specs: list[ProcessSpec], tree: SettingsTree, notifier: Notifier) -> int:
    def pass_on(name: str, state: State, detail: str) -> None:
        """The group's state is that of rank 0; its end is told by the launcher's own exit."""
        if name == specs[0].name and state not in (State.STOPPED, State.FAILED):
            notifier.state(state, detail)

    limits = SupervisionLimits(**tree.supervision.model_dump())
    return await Supervisor(specs, settings=limits, on_state=pass_on).run()
