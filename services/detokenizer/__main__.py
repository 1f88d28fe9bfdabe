"""`python -m services.detokenizer`: one detokenizer process."""

from __future__ import annotations

from headrace.service import run_service

raise SystemExit(run_service("detokenizer"))
