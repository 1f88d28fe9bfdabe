"""How the tokens of a plan's new sequences lie in its frame: each one's own, then what is foretold of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from headrace.errors import ProtocolError
from headrace.v1.worker_pb2 import NewSequence, StepPlan

Int32Array = npt.NDArray[np.int32]

_NO_TOKENS = np.zeros(0, dtype=np.int32)


def num_entering_tokens(plan: StepPlan) -> int:
    """Tokens that the plan's frame is to hold."""
    return sum(sequence.num_tokens + sequence.num_foretold_tokens for sequence in plan.new_sequences)


def entering(plan: StepPlan, token_ids: Int32Array | None) -> Iterator[tuple[NewSequence, Int32Array, Int32Array]]:
    """New sequences, each with its tokens and those that came after the same tokens in an earlier one.

    Args:
        plan: Whose.
        token_ids: Its frame; None where it has none.

    Raises:
        ProtocolError: The frame holds more tokens or fewer.
    """
    held = _NO_TOKENS if token_ids is None else token_ids
    if (num_tokens := num_entering_tokens(plan)) != len(held):
        raise ProtocolError(f"step plan: new sequences have {num_tokens} tokens, their frame holds {len(held)}")
    start = 0
    for sequence in plan.new_sequences:
        middle = start + sequence.num_tokens
        end = middle + sequence.num_foretold_tokens
        yield sequence, held[start:middle], held[middle:end]
        start = end
