"""`python -m services.worker.rank`: one rank process of a worker group; started by the launcher."""

from __future__ import annotations

from headrace.service import run_service

raise SystemExit(run_service("worker"))
