"""One question to the small HTTP endpoint of a service on this machine (headrace/telemetry/exposition.py). Blocks."""

from __future__ import annotations

import http.client
from typing import Final

_ANSWER_MAX_BYTES: Final = 1 << 20
# Who listens on all addresses is asked at the one of this machine.
_REACHED_AT: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def ask(host: str, port: int, path: str, *, timeout_s: float) -> tuple[int, str]:
    """Status and body of a GET, which goes straight there: no proxy of the environment is for this machine's own ports.

    Args:
        host: Where the endpoint listens, as the settings say it.
        port: Its port.
        path: What to ask for.
        timeout_s: Longest silence.

    Raises:
        OSError: Nobody answers, or what does speaks no HTTP.
    """
    connection = http.client.HTTPConnection(_REACHED_AT.get(host, host), port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read(_ANSWER_MAX_BYTES).decode(errors="replace")
    except http.client.HTTPException as error:
        raise OSError(f"what answers speaks no HTTP ({type(error).__name__})") from error
    finally:
        connection.close()
