"""What a rank needs of whatever computes its steps, the model or the mock."""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from headrace.v1.scheduler_pb2 import RowError, StepResult
from headrace.v1.worker_pb2 import StepPlan
from services.worker.batch_inputs import Limits, StepInputs

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


def step_result(plan: StepPlan, step: StepInputs, token_ids: npt.NDArray[np.int64], is_finite: npt.NDArray[np.bool_]) -> StepResult:
    """Put the outcome of a step into its message: one token a row, and the rows that failed."""
    result = StepResult(step_id=plan.step_id)
    slots = step.sampled.slots
    if is_finite.all():
        result.slots.extend(slots.tolist())
        result.token_ids.extend(token_ids.tolist())
    else:
        result.slots.extend(slots[is_finite].tolist())
        result.token_ids.extend(token_ids[is_finite].tolist())
        failed = slots[~is_finite].tolist()
        result.failed_slots.extend(failed)
        result.failed_reasons.extend([RowError.ROW_ERROR_NON_FINITE_LOGITS] * len(failed))
    if step.unknown_slots:
        result.failed_slots.extend(step.unknown_slots)
        result.failed_reasons.extend([RowError.ROW_ERROR_UNKNOWN_SLOT] * len(step.unknown_slots))
    return result
