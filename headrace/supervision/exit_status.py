"""The exit statuses of a supervisor, and the words for a child's exit. Scripts and orchestrators may rely on the numbers.

A stop that was asked for and went well is the only 0; everything else says what went wrong.
"""

from __future__ import annotations

import signal
from enum import IntEnum


class ExitStatus(IntEnum):
    """How a supervised tree ended."""

    CLEAN = 0
    """Asked to stop; every process ended within its deadline."""
    START_FAILED = 1
    """A process ended, or said nothing in time, before it was started for the first time."""
    CONFIG_ERROR = 2
    """A setting stopped the start; the last line on stderr says which. Also a child's own status for the same."""
    CRASH_LOOP = 3
    """A process needed more restarts than its limit allows."""
    STOP_UNCLEAN = 4
    """Asked to stop, but a process had to be terminated or killed, or ended with an error."""
    CHILD_DIED = 5
    """A process that is never restarted ended unasked, and took its group with it."""
    INTERNAL_ERROR = 70
    """The supervisor itself failed: a bug."""
    SUPERVISOR_LOST = 75
    """A child ended itself because its supervisor is gone."""
    INTERRUPTED = 130
    """A second SIGINT: everything was killed at once."""


def describe_exit(returncode: int) -> str:
    """Say how a process ended, from a `Popen.returncode`: "exit status 3" or "killed by SIGKILL"."""
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"
