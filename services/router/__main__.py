"""`python -m services.router`: one router process."""

from __future__ import annotations

from headrace.service import run_service

raise SystemExit(run_service("router"))
