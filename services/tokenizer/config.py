"""Settings of the tokenizer."""

from __future__ import annotations

from pydantic import Field

from headrace.config.settings import Section


class Settings(Section):
    """Threads and bounds of one tokenizer process."""

    num_threads: int = Field(
        default=2, ge=1, le=64, description="Threads that encode; each has a tokenizer and a template renderer of its own."
    )
    queue_max: int = Field(
        default=1024, ge=1, description="Most requests waiting for a thread; further ones are refused as overloaded."
    )
    render_timeout_s: float = Field(
        default=2.0, gt=0, le=60, description="Longest time a chat template may take, seconds; then it is killed."
    )
    render_memory_bytes: int = Field(
        default=1 << 30, ge=1 << 28, description="Most memory (address space) of a process that renders templates, bytes."
    )
    constraint_timeout_s: float = Field(
        default=2.0, gt=0, le=60, description="Longest time that compiling a constraint (a schema, a grammar) may take, seconds."
    )
    constraint_memory_bytes: int = Field(
        default=1 << 30, ge=1 << 28, description="Most memory (address space) of a process that compiles constraints, bytes."
    )
    constraint_cache_bytes: int = Field(
        default=16 << 20, ge=0, description="Most memory for constraints that have been compiled or refused, bytes."
    )
    num_constraint_threads: int = Field(
        default=2, ge=1, le=64, description="Constraints compiled at a time, each in a process of its own, started when needed."
    )
    prompt_bytes_max: int | None = Field(
        default=None,
        ge=1,
        description="Longest text that is encoded, and longest output of a template, bytes; null means 16 for each token "
        "of the context length, but at least 1 MiB.",
    )

    def prompt_bytes_limit(self, max_model_len: int) -> int:
        """The setting, or what it means for a context length when it is null."""
        return self.prompt_bytes_max if self.prompt_bytes_max is not None else max(1 << 20, 16 * max_model_len)
