"""The range of a request's priority: larger is more important, 0 is what everyone has who did not say."""

from __future__ import annotations

from typing import Final

PRIORITY_MIN: Final = -100
PRIORITY_MAX: Final = 100
