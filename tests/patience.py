"""How long tests wait: as long as it takes. A limit here only ends a test that would never end.

A machine under load may stop any process for seconds, so no outcome depends on a time that is short, and no two times are compared.
"""

from __future__ import annotations

import os

WAIT_S = 120.0
"""For what comes in a moment on a machine that does nothing else."""

NEVER_S = 3600.0
"""For what a test does not live to see."""

GROWING_S = (0.1, 1.0, 10.0)
"""For a limit of the product that is to pass in the middle of something: where the first passed too soon, the next is tried."""

IS_MACHINE_QUIET = os.environ.get("TEST_QUIET_MACHINE") == "1"
"""Whether the times that the design promises are held to (`make test-times`); elsewhere they are waited for."""


def promised(seconds: float) -> float:
    """The limit for something that the design promises within `seconds`."""
    return seconds if IS_MACHINE_QUIET else WAIT_S
