"""A runner without a model, for load tests of everything round it: the state and checks of the real one, tokens by a rule.

A token follows from the one before it and its position, so that a sequence that is moved or computed again goes on as it would
have. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from headrace.v1.scheduler_pb2 import StepResult
from headrace.v1.worker_pb2 import StepPlan
from services.worker.batch_inputs import BatchInputs, Limits, page_copies
from services.worker.runner import step_result
from services.worker.sampling_table import Int64Array

_MULTIPLIER: Final = 6364136223846793005
_INCREMENT: Final = 1442695040888963407


class MockRunner:
    """Invents tokens.

    Args:
        limits: Sizes, as for a model.
        step_s: Time of a step, seconds.
        token_s: Further time a token computed, seconds.
        sleep: Takes the time of a step.
    """

    def __init__(self, limits: Limits, *, step_s: float, token_s: float, sleep: Callable[[float], None]) -> None:
        self._inputs = BatchInputs(limits)
        self._step_s = step_s
        self._token_s = token_s
        self._sleep = sleep

    @property
    def limits(self) -> Limits:
        """Sizes to register with."""
        return self._inputs.limits

    @property
    def num_sequences(self) -> int:
        """Sequences held."""
        return self._inputs.num_sequences

    @property
    def max_num_drafts(self) -> int:
        """Its tokens hardly ever repeat: there would be nothing to guess."""
        return 0

    def step(self, plan: StepPlan, token_ids: npt.NDArray[np.int32] | None) -> StepResult:
        """Take the time of a step and invent its tokens.

        Raises:
            ProtocolError: The plan contradicts what is held.
        """
        rows = self._inputs.take(plan, token_ids)
        # It has no pages; what is wrong with a plan shall be found here, too.
        page_copies(plan, self.limits)
        step = self._inputs.lay_out(rows)
        self._sleep(self._step_s + self._token_s * len(step.token_ids))
        sampled = mock_tokens(step.token_ids[step.sampled_tokens], step.sampled.positions, self.limits.vocab_size)
        tokens = self._inputs.commit(step, sampled, np.ones(len(sampled), dtype=np.bool_))
        return step_result(plan, tokens, step.unknown_slots)

    def warm_up(self) -> None:
        """There are no kernels to try."""

    def reset(self) -> None:
        """Forget every sequence."""
        self._inputs.reset()


def mock_tokens(last_tokens: Int64Array, positions: Int64Array, vocab_size: int) -> Int64Array:
    """The tokens that follow: one step of a linear congruential generator over (last token, position), high bits."""
    mixed = (last_tokens.astype(np.uint64) << np.uint64(32)) | positions.astype(np.uint64)
    mixed = mixed * np.uint64(_MULTIPLIER) + np.uint64(_INCREMENT)
    return ((mixed >> np.uint64(33)) % np.uint64(vocab_size)).astype(np.int64)
