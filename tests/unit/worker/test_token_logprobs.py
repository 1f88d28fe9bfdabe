"""Goal: logprobs are those of a log-softmax over the raw logits, told to those who asked and to nobody else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace.v1.worker_pb2 import NewSequence
from services.worker.sampling_table import SampledRows
from services.worker.token_logprobs import LogprobTable, PromptSpan, prompt_indices

VOCAB = 50


def rows_of(slots: list[int]) -> SampledRows:
    ones = np.ones(len(slots), dtype=np.float32)
    return SampledRows(
        slots=np.array(slots, dtype=np.int64),
        positions=np.arange(len(slots)),
        temperature=ones,
        top_k=ones.astype(np.int32),
        top_p=ones,
        min_p=ones,
        seeds=ones.astype(np.uint64),
    )


def logits_of(count: int) -> torch.Tensor:
    return torch.randn((count, VOCAB), generator=torch.Generator().manual_seed(count)) * 5


def test_each_row_gets_as_many_as_it_asked_for() -> None:
    table = LogprobTable(4)
    table.enter(NewSequence(slot=0, num_tokens=3, logprobs=2))
    table.enter(NewSequence(slot=1, num_tokens=3))
    table.enter(NewSequence(slot=2, num_tokens=3, logprobs=0))
    table.enter(NewSequence(slot=3, num_tokens=3, logprobs=5))
    rows, logits, token_ids = rows_of([3, 1, 0, 2]), logits_of(4), np.array([4, 5, 6, 7])
    kept = table.keep(logits, rows)
    # What happens to the logits afterwards changes nothing.
    raw = torch.log_softmax(logits.double(), dim=-1)
    logits[:] = 0
    told = table.of_sampled(kept, rows, token_ids, np.ones(4, dtype=np.bool_))
    assert told is not None
    assert (list(told.rows), list(told.num_tokens), list(told.num_top)) == ([3, 0, 2], [1, 1, 1], [5, 2, 0])
    assert list(told.logprobs) == pytest.approx([raw[0, 4].item(), raw[2, 6].item(), raw[3, 7].item()], abs=1e-5)
    expected = [raw[row].topk(count) for row, count in ((0, 5), (2, 2))]
    assert list(told.top_token_ids) == [token_id for top in expected for token_id in top.indices.tolist()]
    assert list(told.top_logprobs) == pytest.approx([value for top in expected for value in top.values.tolist()], abs=1e-5)


def test_nobody_asked() -> None:
    table = LogprobTable(2)
    table.enter(NewSequence(slot=1, num_tokens=3))
    rows = rows_of([1])
    kept = table.keep(logits_of(1), rows)
    assert kept is None
    assert table.of_sampled(kept, rows, np.array([1]), np.ones(1, dtype=np.bool_)) is None
    assert table.of_prompts(logits_of(1)[:0], []) is None


def test_rows_that_failed_are_left_out() -> None:
    table = LogprobTable(2)
    for slot in range(2):
        table.enter(NewSequence(slot=slot, num_tokens=3, logprobs=1))
    rows, logits = rows_of([0, 1]), logits_of(2)
    logits[0, 3] = torch.nan
    told = table.of_sampled(table.keep(logits, rows), rows, np.array([1, 1]), np.array([False, True]))
    assert told is not None
    assert (list(told.rows), len(told.logprobs), len(told.top_logprobs)) == ([1], 1, 1)


def test_prompts_of_many_tokens_are_told_whole() -> None:
    """More tokens than are computed at once, of two prompts that asked for different numbers."""
    table = LogprobTable(2)
    table.enter(NewSequence(slot=0, num_tokens=41, prompt_logprobs=1))
    table.enter(NewSequence(slot=1, num_tokens=31, prompt_logprobs=0))
    spans = [PromptSpan(0, 5, np.arange(40)), PromptSpan(1, 50, np.arange(30))]
    assert prompt_indices(spans).tolist() == [*range(5, 45), *range(50, 80)]
    logits = logits_of(70)
    raw = torch.log_softmax(logits.double(), dim=-1)
    told = table.of_prompts(logits, spans)
    assert told is not None
    assert (list(told.rows), list(told.num_tokens), list(told.num_top)) == ([0, 1], [40, 30], [1, 0])
    token_ids = torch.cat((torch.arange(40), torch.arange(30)))
    assert list(told.logprobs) == pytest.approx(raw.gather(1, token_ids.unsqueeze(1)).squeeze(1).tolist(), abs=1e-5)
    assert list(told.top_token_ids) == raw[:40].argmax(dim=-1).tolist()
