"""Ports for servers that must be told one before they start."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack
from pathlib import Path

_KERNEL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST_KERNEL_PORT = 32768
"""Where the kernel's range begins unless it was told otherwise."""
_FIRST_PORT = 10_000
"""Well-known ones, ours among them, are lower."""


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 that nobody listens on now.

    They lie below the range out of which the kernel serves whoever asks for any port, so that none is given away in the time
    until it is used. Where there is hardly anything below, the kernel is asked all the same.
    """
    below = range(_FIRST_PORT, _first_kernel_port(_KERNEL_RANGE))
    candidates = random.SystemRandom().sample(below, len(below)) if len(below) > 1000 else []
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < count:
            one = stack.enter_context(socket.socket())
            try:
                one.bind(("127.0.0.1", candidates.pop() if candidates else 0))
            except OSError:
                continue
            found.append(one.getsockname()[1])
    return found


def _first_kernel_port(kernel_range: Path) -> int:
    try:
        return int(kernel_range.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _FIRST_KERNEL_PORT
