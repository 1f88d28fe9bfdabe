"""`python -m services.worker`: one worker group, launcher and ranks."""

from __future__ import annotations

import os
import sys

from services.worker.launcher import launch

if __name__ == "__main__":
    status = launch()
    sys.stdout.flush()
    sys.stderr.flush()
    # All that is left is to take the interpreter apart, and whoever starts the group again would wait for it.
    os._exit(status)
