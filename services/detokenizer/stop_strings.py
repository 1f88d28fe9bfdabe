"""Stop strings, found wherever they stand in the text, token borders included.

The rule does not depend on how the text arrives: reading character by character, the first point at which any stop string is
complete ends the text; where several are complete at the same point, the longest counts (it leaves the least text). Text that
could still turn out to be the beginning of a stop string is held back, and no more than that.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches the text of one stream."""

    __slots__ = ("_held", "_include_stop", "_stops", "is_found")

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        """Watch for `stops`, of which empty ones are ignored.

        Args:
            stops: The strings that end the text.
            include_stop: Leave the stop string itself in the text.
        """
        # Longest first: of stops that end at the same point the first one tried wins.
        self._stops = sorted({stop for stop in stops if stop}, key=len, reverse=True)
        self._include_stop = include_stop
        self._held = ""
        self.is_found = False
        """Whether a stop string ended the text; nothing comes after it."""

    @property
    def held(self) -> str:
        """Text held back now; `restore` takes it."""
        return self._held

    def restore(self, held: str) -> None:
        """Return to the point at which `held` was held back and no stop string was found."""
        self._held = held
        self.is_found = False

    def push(self, text: str) -> str:
        """Take the next text and give what may be shown now."""
        if self.is_found:
            return ""
        buffer = self._held + text
        best_end = len(buffer) + 1
        best_start = 0
        for stop in self._stops:
            start = buffer.find(stop)
            if start >= 0 and start + len(stop) < best_end:
                best_start, best_end = start, start + len(stop)
        if best_end <= len(buffer):
            self.is_found = True
            self._held = ""
            return buffer[: best_end if self._include_stop else best_start]
        cut = self._hold_from(buffer)
        self._held = buffer[cut:]
        return buffer[:cut]

    def flush(self) -> str:
        """End the text: what was held back is no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _hold_from(self, buffer: str) -> int:
        """Find where the longest end of `buffer` begins that is the beginning of a stop string."""
        cut = len(buffer)
        for stop in self._stops:
            start = buffer.find(stop[0], max(0, len(buffer) - len(stop) + 1), cut)
            while start >= 0:
                if stop.startswith(buffer[start:]):
                    cut = start
                    break
                start = buffer.find(stop[0], start + 1, cut)
        return cut
