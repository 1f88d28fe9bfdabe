"""What a rank needs of whatever computes its steps, the model or the mock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from headrace.v1.scheduler_pb2 import RowError, StepResult
from headrace.v1.worker_pb2 import StepPlan
from services.worker.batch_inputs import Limits
from services.worker.step_tokens import StepTokens

POOL_NAME: Final = "full"
"""Name of the one page pool: that of ordinary attention."""


class Runner(Protocol):
    """Computes plans, strictly in order; called on one thread only."""

    @property
    def limits(self) -> Limits:
        """Sizes to register with."""
        ...

    @property
    def num_sequences(self) -> int:
        """Sequences held; may be read from another thread."""
        ...

    @property
    def max_num_drafts(self) -> int:
        """Most drafts it verifies in a row; 0 where it does not speculate."""
        ...

    def step(self, plan: StepPlan, token_ids: npt.NDArray[np.int32] | None) -> StepResult:
        """Compute one plan; times are left to the caller.

        Raises:
            ProtocolError: The plan contradicts what is held.
        """
        ...

    def warm_up(self) -> None:
        """Make the first plan as fast as later ones; called once, before it."""
        ...

    def reset(self) -> None:
        """Forget every sequence."""
        ...


def step_result(
    plan: StepPlan, tokens: StepTokens, unknown_slots: Sequence[int], unfollowed_slots: frozenset[int] = frozenset()
) -> StepResult:
    """Put the outcome of a step into its message: the tokens of each row, and the rows that failed.

    Args:
        plan: The plan answered.
        tokens: What its rows gave.
        unknown_slots: Slots of rows for which nothing is held.
        unfollowed_slots: Where a row failed here, it did so because its constraint cannot be followed further.
    """
    result = StepResult(step_id=plan.step_id, slots=tokens.slots, token_ids=tokens.token_ids, num_drafts=tokens.num_drafts)
    if any(count != 1 for count in tokens.counts):
        result.num_tokens.extend(tokens.counts)
    if tokens.failed_slots:
        result.failed_slots.extend(tokens.failed_slots)
        for slot in tokens.failed_slots:
            is_unfollowed = slot in unfollowed_slots
            result.failed_reasons.append(RowError.ROW_ERROR_CONSTRAINT if is_unfollowed else RowError.ROW_ERROR_NON_FINITE_LOGITS)
    if unknown_slots:
        result.failed_slots.extend(unknown_slots)
        result.failed_reasons.extend([RowError.ROW_ERROR_UNKNOWN_SLOT] * len(unknown_slots))
    return result
