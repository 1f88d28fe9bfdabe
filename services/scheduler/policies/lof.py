"""Longest output first: who may say most begins first, so that short answers fill the gaps at the end."""

from __future__ import annotations

import math

from services.scheduler.policies.by_key import ByKey
from services.scheduler.sequence import Sequence


class LongestOutputFirst(ByKey):
    """By the most tokens a sequence may still make, falling; one without a limit comes before all others."""

    def __init__(self) -> None:
        super().__init__(_key)


def _key(sequence: Sequence) -> float:
    max_tokens = sequence.stopping.max_tokens
    return -math.inf if max_tokens is None else sequence.num_output_tokens - max_tokens
