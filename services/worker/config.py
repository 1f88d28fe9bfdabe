"""Settings of the worker. The model's own (which, how long) are in the common section `model`."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, ValidationInfo, field_validator

from headrace.config.settings import Section

HOST_KV_CACHE_BYTES: Final = 256 * 1024 * 1024
"""Memory for KV pages on a CPU where nothing is set."""

GRAPH_BATCH_SIZES: Final = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


class Settings(Section):
    """One worker group: what it computes with, and how much it holds."""

    runner: Literal["model", "mock"] = Field(
        "model", description="model computes; mock invents tokens by a fixed rule and a time model, for load tests without a model."
    )
    device: Literal["auto", "cpu", "cuda", "rocm"] = Field(
        "auto", description="Where the model is computed; auto is the GPU where torch finds one that the kernels are checked for."
    )
    backend: Literal["auto", "native", "torch"] = Field(
        "auto",
        description="What computes: native CPU kernels, which auto takes where they are built and know the model, or torch.",
    )
    attention_backend: Literal["auto", "native", "torch", "triton"] = Field(
        "auto",
        description="What attends; auto follows worker.backend on a CPU and is triton on a GPU. triton on a CPU runs the GPU's "
        "kernels under Triton's interpreter: for tests, and very slow.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Type of weights that are not quantised, and of KV; auto is bfloat16 on a GPU, and on CPUs that have it.",
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
    kv_cache_bytes: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Memory for KV pages; auto is 256 MiB on a CPU, and all that is free on a GPU but for the reserve.",
    )
    kv_cache_dtype: Literal["auto", "fp8_e4m3"] = Field(
        "auto",
        description="Type of KV pages; auto is that of the computation. fp8_e4m3 holds twice the tokens of bfloat16 in the same "
        "memory, loses some quality (docs/quality.md), and is there on a CPU alone: for contexts that do not fit otherwise.",
    )
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
    reserve_bytes: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="Memory of a GPU that KV pages leave to all else; auto measures what the largest step takes "
        "(services/worker/README.md, Memory of a GPU).",
    )
    graph_batch_sizes: list[Annotated[int, Field(ge=1, le=4096)]] = Field(
        list(GRAPH_BATCH_SIZES),
        description="Numbers of rows for which decode steps are captured as graphs on a GPU; others are padded to the next. "
        "Those over max_num_seqs count as that; an empty list captures none.",
    )
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
