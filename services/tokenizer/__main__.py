"""`python -m services.tokenizer`: one tokenizer process."""

from __future__ import annotations

from headrace.service import run_service

raise SystemExit(run_service("tokenizer"))
