"""Settings of the detokenizer."""

from __future__ import annotations

from pydantic import Field

from headrace.config.settings import Section


class Settings(Section):
    """Bounds of one detokenizer process."""

    streams_max: int = Field(default=65536, ge=1, description="Most open streams; further ones end at once with an error.")
    pending_tokens_max: int = Field(
        default=262_144, ge=1, description="Most tokens kept for streams that their router has not opened yet; the oldest go first."
    )
    pending_age_max_s: float = Field(default=30.0, gt=0, description="How long such tokens are kept, seconds.")
    unsent_tokens_max: int = Field(
        default=4096, ge=1, description="Most tokens one stream gathers while its router does not read; then it is rewound."
    )
    backlog_tokens_max: int = Field(
        default=1_048_576, ge=1, description="Most tokens waiting to be decoded; batches over it are dropped and asked for again."
    )
    callback_tokens_max: int = Field(
        default=8192, ge=1, description="Most tokens decoded in one turn of the event loop, so that heartbeats are never late."
    )
    resend_interval_s: float = Field(
        default=0.01, gt=0, description="How often text for a router with a full queue is offered again, seconds."
    )
    repeat_after_s: float = Field(
        default=1.0, gt=0, description="After how long a gap or a stop that stands is told again, seconds."
    )
