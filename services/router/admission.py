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

    def admit(self, now_ns: int, num_choices: int = 1) -> None:
        """Count a request in, each of its choices as one.

        Raises:
            OverloadedError: Too many are open; it says when enough should have ended.
        """
        num_missing = self.num_open + num_choices - self._max_open
        if num_missing > 0:
            asked = "" if num_choices == 1 else f", this one has {num_choices} choices"
            raise OverloadedError(
                f"router: {self.num_open} requests are open{asked}, the limit max_open_requests is {self._max_open}; retry later",
                retry_after_s=self.retry_after_s(now_ns, num_missing),
            )
        self.num_open += num_choices

    def release(self, now_ns: int, num_choices: int = 1) -> None:
        """Count a request out."""
        self.num_open -= num_choices
        self._ended_ns.extend([now_ns] * num_choices)

    def retry_after_s(self, now_ns: int, num_places: int = 1) -> float:
        """When so many places should be free, by the mean time between the last endings; the time since the last one counts too."""
        if not self._ended_ns:
            return _LEAST_RETRY_S
        # With one ending only, the wait since then is all that is known.
        interval_s = (now_ns - self._ended_ns[0]) / 1e9 / len(self._ended_ns)
        return min(_MOST_RETRY_S, max(_LEAST_RETRY_S, num_places * interval_s))
