"""One pytest run that leaves a report of what it did: how many tests it selected, how many ended, how many passed.

    python tools/suite_process.py REPORT [pytest arguments...]

The report is written when pytest's session is over, and so is missing when the process left in any other way. An exit status says
nothing of that: a test that ends the process with status 0 looks like success.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest


class Counts:
    """Counts a session's tests and writes the report at its end."""

    def __init__(self, report: Path) -> None:
        self._report = report
        self._num_ended = 0
        self._num_passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A phase of a test is over."""
        self._num_passed += report.when == "call" and report.passed
        self._num_ended += report.when == "teardown"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """All is over."""
        counts = {"selected": len(getattr(session, "items", ())), "ended": self._num_ended, "passed": self._num_passed}
        self._report.write_text(json.dumps(counts))


if __name__ == "__main__":
    # As `python -m pytest` has it: the project's root, not tools/.
    sys.path[0] = os.getcwd()
    sys.exit(pytest.main(sys.argv[2:], plugins=[Counts(Path(sys.argv[1]))]))
