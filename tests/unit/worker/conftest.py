"""Plans by hand, for the parts of the worker that stand on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from headrace.v1.common_pb2 import SamplingParams, WorkHeader
from headrace.v1.worker_pb2 import NewSequence, StepPlan
from services.worker.batch_inputs import Limits


@pytest.fixture
def limits() -> Limits:
    return Limits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=40, num_pages=32, page_size=4, vocab_size=100)


@pytest.fixture
def plan() -> Callable[..., StepPlan]:
    """A plan from plain values: `new={slot: num_tokens}`, `pages={slot: [page, …]}`, `rows={slot: num_new_tokens}`;
    `drafts` and `end` are the most drafts and tokens of its new sequences."""

    def make(
        *,
        new: dict[int, int] | None = None,
        pages: dict[int, list[int]] | None = None,
        rows: dict[int, int] | None = None,
        freed: list[int] | None = None,
        cached: int = 0,
        drafts: int = 0,
        end: int = 0,
        **sampling: Any,
    ) -> StepPlan:
        made = StepPlan(step_id=1, freed_slots=freed or [])
        params = SamplingParams(**({"temperature": 0.0, "seed": 5} | sampling))
        for slot, num_tokens in (new or {}).items():
            work = WorkHeader(request_id=f"r{slot}")
            made.new_sequences.append(
                NewSequence(
                    slot=slot,
                    work=work,
                    num_tokens=num_tokens,
                    num_cached_tokens=cached,
                    sampling=params,
                    max_num_drafts=drafts,
                    max_num_tokens=end,
                )
            )
        for slot, indices in (pages or {}).items():
            made.page_slots.append(slot)
            made.num_new_pages.append(len(indices))
            made.new_pages.extend(indices)
        made.row_slots.extend(rows or {})
        made.row_num_new_tokens.extend((rows or {}).values())
        return made

    return make
