"""How many requests may be open at once, and what those over it are told. Pure."""

from __future__ import annotations

from collections import deque

from headrace.errors import OverloadedError

_WINDOW = 64
_LEAST_RETRY_S, _MOST_RETRY_S = 1.0, 60.0


class Admission:
    """Counts open requests and measures how fast they end."""

    def __init__(self, max_open_requests: int) -> None:
        self._max_open = max_open_requests
        self._ended_ns: deque[int] = deque(maxlen=_WINDOW)
        self.num_open = 0

    def admit(self, now_ns: int) -> None:
        """Count a request in.

        Raises:
            OverloadedError: As many as may be are open; it says when one should have ended.
        """
        if self.num_open >= self._max_open:
            raise OverloadedError(
                f"router: {self.num_open} requests are open, the limit max_open_requests is {self._max_open}; retry later",
                retry_after_s=self.retry_after_s(now_ns),
            )
        self.num_open += 1

    def release(self, now_ns: int) -> None:
        """Count a request out."""
        self.num_open -= 1
        self._ended_ns.append(now_ns)

    def retry_after_s(self, now_ns: int) -> float:
        """Mean time between the last endings, which is when a place should be free; the time since the last one counts too."""
        if not self._ended_ns:
            return _LEAST_RETRY_S
        # With one ending only, the wait since then is all that is known.
        interval_s = (now_ns - self._ended_ns[0]) / 1e9 / len(self._ended_ns)
        return min(_MOST_RETRY_S, max(_LEAST_RETRY_S, interval_s))
