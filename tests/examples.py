"""Which examples property tests draw: the same in every run, or with `TEST_SEARCH=1` new ones, to search for what nobody has seen.

What is delivered is judged by the same examples as the change before it; whoever changes a core searches beside that.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

IS_SEARCHING = os.environ.get("TEST_SEARCH") == "1"


def load_profile() -> None:
    """Make this the default of all property tests; an example may take as long as a busy machine makes it."""
    settings.register_profile(
        "headrace",
        settings.get_profile("default"),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        derandomize=not IS_SEARCHING,
    )
    settings.load_profile("headrace")
