"""Settings of the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pydantic import Field, field_validator

from headrace.config.settings import Section
from headrace.output_formats import REASONING_FORMATS, TOOL_FORMATS

AUTO: Final = "auto"
NONE: Final = "none"


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
    constraint_bytes_max: int = Field(default=256 << 10, ge=1, description="Longest constraint (a schema, a grammar), bytes.")
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

    tool_parser: str = Field(
        default=AUTO,
        description=f"How the model writes tool calls: one of {', '.join(TOOL_FORMATS)}; auto tells it from the chat template, "
        "none leaves calls in the text.",
    )
    reasoning_parser: str = Field(
        default=AUTO,
        description=f"How the model writes reasoning: one of {', '.join(REASONING_FORMATS)}; auto tells it from the chat template, "
        "none leaves reasoning in the text.",
    )

    @field_validator("tool_parser")
    @classmethod
    def _check_tool_parser(cls, name: str) -> str:
        return _known(name, TOOL_FORMATS)

    @field_validator("reasoning_parser")
    @classmethod
    def _check_reasoning_parser(cls, name: str) -> str:
        return _known(name, REASONING_FORMATS)

    def prompt_bytes_limit(self, max_model_len: int) -> int:
        """The setting, or what it means for a context length when it is null."""
        return self.prompt_bytes_max if self.prompt_bytes_max is not None else max(1 << 20, 16 * max_model_len)


def _known(name: str, names: Iterable[str]) -> str:
    allowed = [AUTO, NONE, *names]
    if name not in allowed:
        raise ValueError(f"must be one of {', '.join(allowed)}")
    return name
