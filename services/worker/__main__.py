"""`python -m services.worker`: one worker group, launcher and ranks."""

from __future__ import annotations

from services.worker.launcher import launch

raise SystemExit(launch())
