"""Tests of the tests: kernels broken on purpose, in ways that happen, must be caught by the checks that the tests make.

Method: one place of a kernel's source is changed, the changed module takes the place of the real one in `launch.py`, and the same
comparison as in the op's own tests must fail. That the place is there exactly once keeps a mutation from missing its kernel. None
of them leaves the memory that its kernel was given: such a one would end the process, which is caught by `tools/run_suites.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels.attention_inputs import Scoring
from kernels.extend_attention import launch as extend_launch
from kernels.launching import forget_plans
from kernels.paged_decode_attention import launch as decode_launch
from tests.kernels import (
    test_causal_conv1d,
    test_extend_attention,
    test_fused_moe,
    test_lora,
    test_paged_decode_attention,
    test_quantized_matmul,
    test_rms_norm,
    test_selective_state_update,
    test_store_kv,
)
from tests.kernels.comparing import normal
from tests.kernels.paging import paged


def mutate(op: str, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a copy of an op's kernels with `old` changed to `new` in the place of the real ones."""
    real = importlib.import_module(f"kernels.{op}.kernel")
    assert real.__file__ is not None
    source = Path(real.__file__).read_text()
    assert source.count(old) == 1, f"kernels/{op}/kernel.py holds {old!r} {source.count(old)} times: choose another place"
    path = folder / f"mutated_{op}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    launch = importlib.import_module(f"kernels.{op}.launch")
    for name in [name for name in vars(launch) if name.endswith("_kernel")]:
        monkeypatch.setattr(launch, name, getattr(module, name))
    forget_plans()


def extend_rows() -> None:
    test_extend_attention.attend_both(normal(25, 4, 32), paged([5, 40]), [5, 20], window=17)


def decode_rows() -> None:
    test_paged_decode_attention.attend_both(normal(3, 4, 32), paged([16, 17, 300]), window=290)


def decode_long_rows() -> None:
    test_paged_decode_attention.attend_both(normal(2, 4, 32), paged([300, 700]), sinks=True)


def store_rows() -> None:
    test_store_kv.test_tokens_go_to_their_slots(3, 64, 16, torch.int64, torch.float32)


def normalise_rows() -> None:
    test_rms_norm.test_rows_are_normalised(3, 63, torch.float32)


def route_tokens() -> None:
    test_fused_moe.test_a_token_gets_its_best_experts(9, 8, 2, {}, torch.float32)


def run_experts() -> None:
    test_fused_moe.test_tokens_get_their_experts_weighted_sum(21, 3, 2, 33, 21, torch.float32)


def multiply_by_4_bits() -> None:
    test_quantized_matmul.test_zero_points_may_be_absent_or_stored_less_1("gptq")


def convolve_with_long_states() -> None:
    test_causal_conv1d.test_a_state_may_be_longer_than_the_window(6)


def keep_states_between() -> None:
    test_selective_state_update.test_without_keeping_it_the_state_stays_bit_for_bit()


def adapt_rows() -> None:
    test_lora.test_ranks_of_all_sizes(16)


def split_rows() -> None:
    test_lora.test_a_split_sum_is_the_sum(2)


MUTATIONS: dict[str, tuple[Callable[[], None], str, str, str]] = {
    "mask-shows-the-next-token": (
        extend_rows,
        "extend_attention",
        "tokens[None, :] <= positions[:, None]",
        "tokens[None, :] <= positions[:, None] + 1",
    ),
    "window-is-one-too-wide": (extend_rows, "extend_attention", "positions[:, None] - window)", "positions[:, None] - window - 1)"),
    "window-of-decode-is-off-by-one": (decode_rows, "paged_decode_attention", "tokens >= visible_from", "tokens > visible_from"),
    "context-is-one-too-short": (
        decode_rows,
        "paged_decode_attention",
        "is_context = tokens < end",
        "is_context = tokens < end - 1",
    ),
    "page-is-the-next": (
        decode_rows,
        "paged_decode_attention",
        "table_ptr + tokens // PAGE_SIZE",
        "table_ptr + (tokens + 1) // PAGE_SIZE",
    ),
    "place-in-page-is-shifted": (store_rows, "store_kv", "slot % PAGE_SIZE", "(slot + 1) % PAGE_SIZE"),
    "reduction-is-missing": (decode_long_rows, "paged_decode_attention", "if num_splits > 1:", "if num_splits > MAX_SPLITS:"),
    "reduction-forgets-weights": (decode_long_rows, "paged_decode_attention", "partials * weights[:, None]", "partials"),
    "reduction-leaves-the-last-split-out": (
        decode_long_rows,
        "paged_decode_attention",
        "mask=splits < num_splits,",
        "mask=splits < num_splits - 1,",
    ),
    "mean-is-over-the-block": (normalise_rows, "rms_norm", "axis=1) / hidden_size", "axis=1) / BLOCK"),
    "expert-is-chosen-twice": (route_tokens, "fused_moe", "tl.where(is_best, never, packed)", "packed"),
    "gate-is-taken-for-up": (run_experts, "fused_moe", "(1 if IS_INTERLEAVED else intermediate)", "0"),
    "router-weight-is-forgotten": (run_experts, "fused_moe", "result *= tl.load(", "_ = tl.load("),
    "zero-point-does-not-wrap": (
        multiply_by_4_bits,
        "quantized_matmul",
        "(unpack_words(zero_words, shifts, BLOCK_N) + zero_offset) & 15",
        "unpack_words(zero_words, shifts, BLOCK_N) + zero_offset",
    ),
    "group-is-that-of-the-step-before": (
        multiply_by_4_bits,
        "quantized_matmul",
        "first // group_size",
        "(first // group_size) // 2",
    ),
    "state-is-read-one-early": (convolve_with_long_states, "causal_conv1d", "(STATE_LEN + sources)", "(STATE_LEN - 1 + sources)"),
    "state-moves-one-too-few": (
        convolve_with_long_states,
        "causal_conv1d",
        "moved = columns + num_tokens",
        "moved = columns + num_tokens - 1",
    ),
    "row-is-the-slot": (
        keep_states_between,
        "selective_state_update",
        "tl.load(intermediate_indices_ptr + sequence)",
        "tl.load(slots_ptr + sequence)",
    ),
    "group-of-heads-is-interleaved": (
        keep_states_between,
        "selective_state_update",
        "group = head // heads_per_group",
        "group = head % heads_per_group",
    ),
    "rank-is-the-largest": (adapt_rows, "lora", "is_rank = rows < rank", "is_rank = rows < rank_max"),
    "split-is-left-out": (
        split_rows,
        "lora",
        "for split in tl.static_range(NUM_SPLITS)",
        "for split in tl.static_range(NUM_SPLITS - 1)",
    ),
}


@pytest.mark.parametrize(("check", "op", "old", "new"), MUTATIONS.values(), ids=MUTATIONS)
def test_a_broken_kernel_is_caught(
    check: Callable[[], None], op: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check()
    mutate(op, old, new, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_a_copy_that_is_not_broken_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails above fails for the change, and not because the kernel is a copy."""
    for op in ("extend_attention", "paged_decode_attention"):
        mutate(op, "weighted = tl.zeros((", "weighted = tl.zeros( (", tmp_path, monkeypatch)
    assert extend_launch.extend_attention_kernel.fn.__module__ == "mutated_extend_attention"
    extend_rows()
    decode_long_rows()
    context = paged([20])
    decode_launch.paged_decode_attention(
        normal(1, 2, 32), context.layer_pages, context.page_tables, context.lengths, scoring=Scoring(1.0), max_length=20
    )
