"""A random order: no client can gain from when or how it sends."""

from __future__ import annotations

import random

from services.scheduler.policies.by_key import ByKey


class RandomOrder(ByKey):
    """Each sequence draws its place once, when it begins to wait."""

    def __init__(self, seed: int = 0) -> None:
        rng = random.Random(seed)
        super().__init__(lambda _sequence: rng.random())
