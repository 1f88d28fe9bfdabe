"""What is compiled and put on the roofline for sampling."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.aot.cases import CompileCase, Workload
from kernels.architecture import Architecture
from kernels.sample.kernel import sample_adjust_kernel, sample_draw_kernel
from kernels.sample.launch import ADJUST_BLOCK, ADJUST_CONFIG, BITS, DRAW_CONFIG, NEAR, block_of, num_blocks_of


def cases(architecture: Architecture) -> Iterator[CompileCase]:
    """Large and small vocabularies; lists of entries."""
    for vocab_size in (128256, 500):
        yield _draw_case(vocab_size)
    for indices in ("i64", "i32"):
        yield _adjust_case(indices)


def workloads() -> Iterator[Workload]:
    """The logits of 64 rows of 128256, read from memory once: what top-k and top-p read again comes from the cache."""
    yield Workload("draw of 64 rows × 128256", 64 * 128256 * 4, 64 * 128256 * 8, "fp32")


def _draw_case(vocab_size: int) -> CompileCase:
    types = {"tokens_ptr": "*i64", "is_valid_ptr": "*u8", "logits_ptr": "*fp32", "top_k_ptr": "*i32"}
    types |= {"temperature_ptr": "*fp32", "top_p_ptr": "*fp32", "min_p_ptr": "*fp32", "seeds_ptr": "*i64", "positions_ptr": "*i64"}
    types |= {"near_logits_ptr": "*fp32", "near_tokens_ptr": "*i32", "vocab_size": "i32", "stride_logits_row": "i32"}
    block = block_of(vocab_size)
    unaligned = frozenset({"vocab_size"})
    constants = {"NEAR": NEAR, "BITS": BITS, "NUM_BLOCKS": num_blocks_of(vocab_size), "BLOCK": block}
    return CompileCase(f"vocabulary in blocks of {block}", sample_draw_kernel, types, constants, DRAW_CONFIG, unaligned)


def _adjust_case(indices: str) -> CompileCase:
    types = {"logits_ptr": "*fp32", "starts_ptr": f"*{indices}", "tokens_ptr": f"*{indices}", "output_counts_ptr": "*i32"}
    types |= {"is_seen_ptr": "*u8", "biases_ptr": "*fp32", "repetition_ptr": "*fp32", "frequency_ptr": "*fp32"}
    types |= {"presence_ptr": "*fp32", "vocab_size": "i32", "stride_logits_row": "i32"}
    unaligned = frozenset({"vocab_size"})
    return CompileCase(f"entries {indices}", sample_adjust_kernel, types, {"BLOCK": ADJUST_BLOCK}, ADJUST_CONFIG, unaligned)
