"""structlog, set up once a process: JSON lines when stderr is no terminal, a readable console otherwise.

Events are constants of the form `noun.past_verb`; values are keys. Prompts and outputs are never logged. Trace ids are added from
the bound context of the line, where the caller gives one.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from headrace.telemetry.standard_streams import Take, lose_unheard_lines

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(*, service: str, instance: str, level: str = "info", output: str = "auto", take_stderr: Take | None = None) -> None:
    """Send every log line of this process to stderr, which from now on takes them or loses them, as stdout does.

    Args:
        service: Name of the service, on each line.
        instance: Stable name of the instance, on each line.
        level: One of `LEVELS`.
        output: "json", "console", or "auto" (console when stderr is a terminal).
        take_stderr: Takes what would go to stderr; see `lose_unheard_lines`.
    """
    lose_unheard_lines(take_stderr)
    is_console = output == "console" or (output == "auto" and sys.stderr.isatty())
    renderer: Any = structlog.dev.ConsoleRenderer() if is_console else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(service=service, instance=instance)
    # Libraries log through the standard module; their warnings are ours to show.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s", force=True)


def get_logger() -> Any:
    """A logger bound to the process's service and instance."""
    return structlog.get_logger()
