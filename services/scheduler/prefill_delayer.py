"""Delays new prefills until all lanes of a group have one.

Lanes of one group step together (data-parallel attention): a pass takes as long as its slowest lane, so one that prefills alone has
all others wait. A new prefill is therefore put off until every lane of the group has one to begin, but for no more than
`max_delay_passes - 1` passes in a row, and not at all while a lane with one has few of its pages in use. Prompts of which a part is
computed already are never put off.

    lanes that could begin a prefill | and                                  | new prefills | reason          | the wait
    all                              | nobody has waited                    | begin        | no_wait         | ends
    all                              | there was a wait                     | begin        | wait_success    | ends
    none                             |                                      | -            |                 | ends
    some                             | one of them is below the watermark   | begin        | token_watermark | ends
    some                             | no lane could compute anything else  | begin        | wait_timeout    | ends
    some                             | fewer denials than max - 1 in a row  | wait         | delay           | goes on
    some                             | else                                 | begin        | wait_timeout    | ends

Source: SGLang's prefill delayer. Waits are observed as they were before the pass, which the original forgets; and passes that would
compute nothing are not waited for, which the original goes through one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Estimation = Literal["all", "none", "mixed"]
Reason = Literal["", "no_wait", "wait_success", "delay", "wait_timeout", "token_watermark"]


@dataclass(frozen=True, slots=True)
class DelayerLimits:
    """When a delay ends.

    Attributes:
        max_delay_passes: One more than the passes in a row by which a prefill may be put off; 0 and 1 never put one off.
        token_usage_low_watermark: A lane with less of its pages in use, as a share, does not wait; None for no such lane.
    """

    max_delay_passes: int = 30
    token_usage_low_watermark: float | None = None

    def __post_init__(self) -> None:
        if self.max_delay_passes < 0:
            raise ValueError(f"max_delay_passes must be at least 0, got {self.max_delay_passes}")
        watermark = self.token_usage_low_watermark
        if watermark is not None and not 0 <= watermark <= 1:
            raise ValueError(f"token_usage_low_watermark must be between 0 and 1, got {watermark}")


@dataclass(frozen=True, slots=True)
class LanePass:
    """One lane before a pass.

    Attributes:
        is_prefillable: It holds a prompt that could begin.
        token_usage: Share of its pages that running sequences hold.
    """

    is_prefillable: bool
    token_usage: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Denials in a row.

    Attributes:
        num_passes: How many.
        since_ns: Time of the first.
    """

    num_passes: int
    since_ns: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What holds for all lanes of a group in one pass.

    Attributes:
        allow: New prefills may begin.
        estimation: How many lanes could begin one.
        reason: Why so.
        waited_passes: Denials in a row before this pass.
        waited_ns: Time since the first of them.
    """

    allow: bool
    estimation: Estimation
    reason: Reason
    waited_passes: int
    waited_ns: int


@dataclass(frozen=True, slots=True)
class PassOutcome:
    """A pass as it went: `was_executed` says whether a new prefill really began."""

    decision: Decision
    was_executed: bool


def decide(
    lanes: Sequence[LanePass], wait: Wait | None, limits: DelayerLimits, now_ns: int, *, is_idle: bool = False
) -> tuple[Decision, Wait | None]:
    """Apply the table; `is_idle` says that no lane could compute anything else. Gives the decision, and the wait that is left."""
    num_prefillable = sum(lane.is_prefillable for lane in lanes)
    waited_passes = wait.num_passes if wait is not None else 0
    waited_ns = max(0, now_ns - wait.since_ns) if wait is not None else 0

    def decision(estimation: Estimation, reason: Reason, *, allow: bool = True) -> Decision:
        return Decision(allow, estimation, reason, waited_passes, waited_ns)

    if not num_prefillable:
        return decision("none", ""), None
    if num_prefillable == len(lanes):
        return decision("all", "no_wait" if wait is None else "wait_success"), None
    watermark = limits.token_usage_low_watermark
    if watermark is not None and any(lane.is_prefillable and lane.token_usage < watermark for lane in lanes):
        return decision("mixed", "token_watermark"), None
    if not is_idle and waited_passes < limits.max_delay_passes - 1:
        return decision("mixed", "delay", allow=False), Wait(waited_passes + 1, wait.since_ns if wait is not None else now_ns)
    return decision("mixed", "wait_timeout"), None


class OnePass:
    """A pass under way: set `was_executed` when a new prefill goes out."""

    def __init__(self, decision: Decision) -> None:
        self.decision = decision
        self.was_executed = False


class PrefillDelayer:
    """The delayer of one group of lanes."""

    def __init__(self, limits: DelayerLimits) -> None:
        self._limits = limits
        self._wait: Wait | None = None
        self._outcomes: list[PassOutcome] = []

    @contextmanager
    def one_pass(self, lanes: Sequence[LanePass], now_ns: int, *, is_idle: bool = False) -> Iterator[OnePass]:
        """Decide for a pass, and note how it went, whatever happens in it."""
        decision, self._wait = decide(lanes, self._wait, self._limits, now_ns, is_idle=is_idle)
        under_way = OnePass(decision)
        try:
            yield under_way
        finally:
            self._outcomes.append(PassOutcome(decision, under_way.was_executed))

    def take_outcomes(self) -> list[PassOutcome]:
        """The passes since the last call."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes
