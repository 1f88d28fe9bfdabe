"""Settings of the scheduler."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from headrace.config.settings import Section
from headrace.priorities import PRIORITY_MAX, PRIORITY_MIN


class Settings(Section):
    """Bounds and order of one scheduler's waiting queue."""

    policy: Literal["fcfs", "lpm", "dfs-weight", "lof", "random", "fair", "priority"] = Field(
        "fcfs",
        description="Order in which waiting requests are admitted: fcfs, first come first served; lpm, longest cached prefix "
        "first; dfs-weight, the cached prefix for which most wait first; lof, longest possible output first; random; "
        "fair, by what each tenant (a request's `user`, else its API key) has been served; priority, by a request's `priority`.",
    )
    priority_preemption_threshold: int = Field(
        10,
        ge=1,
        le=PRIORITY_MAX - PRIORITY_MIN,
        description="Policy priority: a running request makes room for a waiting one that is so much more important.",
    )
    prefix_cache: Literal["lru", "lfu", "fifo", "priority", "off"] = Field(
        "lru",
        description="What of the prefix cache goes first when its pages are needed: lru, least recently used; lfu, least often "
        "used; fifo, oldest; priority, used by the least important requests; off: keep no prefixes.",
    )
    prefill_delay_passes_max: int = Field(
        30,
        ge=0,
        le=10_000,
        description="Lanes of one group: a new prefill waits fewer passes than this for all others to have one; 0 never waits.",
    )
    prefill_delay_low_watermark: float | None = Field(
        None, ge=0, le=1, description="Lanes of one group: with a smaller share of its pages in use, a lane's prefills do not wait."
    )
    mixed_step_target_s: float = Field(
        0.08,
        ge=0,
        le=60,
        description="A step that computes prompts beside decoding sequences takes so much of the prompts as keeps it within this "
        "time by measured costs, seconds, and at least a page; 0 does not limit it.",
    )
    run_ahead: bool = Field(
        True,
        description="Plan a step while the worker computes the one before it, so that it never waits; false: after its result.",
    )
    max_waiting_requests: int = Field(
        1024, ge=1, description="Most requests that wait for a lane; further ones are refused as overloaded."
    )
    max_waiting_tokens: int = Field(
        2_097_152, ge=1, description="Most tokens of waiting requests together; a request that would wait alone is always taken."
    )
    unsent_linger_s: float = Field(
        30.0, gt=0, description="How long finished output is kept for a detokenizer that cannot be reached, seconds."
    )
    detokenizer_idle_s: float = Field(
        60.0, gt=0, description="Time without streams after which the link to a detokenizer is dropped, seconds."
    )
