"""Settings of the worker. The model's own (which, how long) are in the common section `model`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from headrace.config.settings import Section


class Settings(Section):
    """One worker group: what it computes with, and how much it holds."""

    runner: Literal["model", "mock"] = Field(
        "model", description="model computes; mock invents tokens by a fixed rule and a time model, for load tests without a model."
    )
    backend: Literal["auto", "native", "torch"] = Field(
        "auto",
        description="What computes: native CPU kernels, which auto takes where they are built and know the model, or torch.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Type of weights that are not quantised, and of KV; auto is bfloat16 where the CPU has it natively.",
    )
    num_ranks: int = Field(1, ge=1, description="Processes of the group; more than 1 is not supported yet.")
    num_threads: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        "auto",
        description="Threads that compute; auto is one a physical core it may use (docs/decisions/0005-worker-threads.md).",
    )
    lane_group: str = Field(
        "", max_length=64, description="Workers of one group step together, as data-parallel attention wants it; empty: alone."
    )
    standby: bool = Field(
        True, description="Keep a second process that has imported torch beside the worker; it takes over when the worker ends."
    )
    max_num_seqs: int = Field(64, ge=1, le=4096, description="Most sequences held at once.")
    max_num_batched_tokens: int = Field(512, ge=1, le=65536, description="Most tokens a step computes; long prompts are chunked.")
    page_size: int = Field(32, ge=1, le=256, description="Tokens a KV page; the unit of allocation and of prefix sharing.")
    kv_cache_bytes: int = Field(256 * 1024 * 1024, ge=1, description="Memory for KV pages.")
    kv_cache_tokens: int | None = Field(None, ge=1, description="Tokens that the KV pages hold; leads over kv_cache_bytes.")
    grammar_cache_bytes: int = Field(
        256 * 1024 * 1024, ge=1, description="Most memory for compiled grammars of constrained outputs; those in use come on top."
    )
    speculative: Literal["off", "ngram", "auto"] = Field(
        "auto",
        description="Guess tokens ahead and verify several in one pass; outputs stay the same. ngram: continue what followed the "
        "last tokens where they stood before; auto: the same, where measured acceptance and step times say that it is faster; off.",
    )
    num_speculative_tokens: int = Field(8, ge=1, le=64, description="Most guessed tokens of a sequence verified in one step.")
    mock_step_s: float = Field(0.005, ge=0, le=60, description="Mock runner: time of a step.")
    mock_token_s: float = Field(0.00005, ge=0, le=1, description="Mock runner: further time a token computed.")

    @field_validator("kv_cache_tokens")
    @classmethod
    def _fills_pages(cls, tokens: int | None, info: ValidationInfo) -> int | None:
        # Missing where it was refused itself.
        page_size = info.data.get("page_size", 1)
        if tokens is not None and tokens % page_size:
            nearest = sorted({max(page_size, tokens // page_size * page_size), -(-tokens // page_size) * page_size})
            raise ValueError(f"must be a multiple of page_size, {page_size}, like {' or '.join(map(str, nearest))}")
        return tokens
