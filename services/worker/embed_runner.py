"""A runner that embeds: whole texts in, one vector each out; nothing is held between steps. Knows no torch.

What a plan is for such a worker: docs/decisions/0007-embeddings.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from headrace.errors import ProtocolError
from headrace.models.embedding_config import EmbeddingConfig
from headrace.v1.scheduler_pb2 import RowError, StepResult
from headrace.v1.worker_pb2 import StepPlan
from services.worker.batch_inputs import Limits

_WARM_UP_TOKENS = 8


class Embeds(Protocol):
    """What computes the vectors."""

    def embed(self, token_ids: npt.NDArray[np.int32], row_lengths: Sequence[int]) -> npt.NDArray[np.float32]:
        """Compute one vector a row, `[num_rows, size]`, from all rows' tokens, one row after another."""
        ...


class EmbedRunner:
    """Implements `Runner` for a model that gives vectors.

    Args:
        embedder: Computes them.
        limits: Sizes; there are no pages, whatever it says of them.
        vectors: What is told of its vectors.
    """

    def __init__(self, embedder: Embeds, limits: Limits, vectors: EmbeddingConfig) -> None:
        # A text that fits no step can never be computed.
        self.limits = replace(limits, max_model_len=min(limits.max_model_len, limits.max_num_batched_tokens), num_pages=0)
        self.vectors = vectors
        self._embedder = embedder
        self._vectors = b""

    @property
    def num_sequences(self) -> int:
        """None outlives its step."""
        return 0

    @property
    def max_num_drafts(self) -> int:
        """There is nothing to guess."""
        return 0

    def step(self, plan: StepPlan, token_ids: npt.NDArray[np.int32] | None) -> StepResult:
        """Compute one plan; its vectors are then at `take_vectors`, and times are left to the caller.

        Raises:
            ProtocolError: The plan is none of whole texts, or does not fit a step.
        """
        result = StepResult(step_id=plan.step_id, vector_size=self.vectors.size)
        self._vectors = b""
        if not plan.row_slots:
            return result
        lengths = self._checked_lengths(plan, token_ids)
        assert token_ids is not None
        vectors = self._embedder.embed(token_ids, lengths)
        is_finite = np.asarray(np.isfinite(vectors).all(axis=1))
        for slot, is_good in zip(plan.row_slots, is_finite.tolist(), strict=True):
            if is_good:
                result.slots.append(slot)
            else:
                result.failed_slots.append(slot)
                result.failed_reasons.append(RowError.ROW_ERROR_NON_FINITE_VECTOR)
        self._vectors = vectors[is_finite].astype("<f4").tobytes()
        return result

    def take_vectors(self) -> bytes:
        """Vectors of the last step, little-endian float32, in the order of its slots."""
        vectors, self._vectors = self._vectors, b""
        return vectors

    def warm_up(self) -> None:
        """Compute a short text, so that the first one asked for takes no longer."""
        num_tokens = min(_WARM_UP_TOKENS, self.limits.max_model_len)
        self._embedder.embed(np.zeros(num_tokens, dtype=np.int32), [num_tokens])

    def reset(self) -> None:
        """Nothing is held."""

    def _checked_lengths(self, plan: StepPlan, token_ids: npt.NDArray[np.int32] | None) -> list[int]:
        lengths = list(plan.row_num_new_tokens)
        told = {new.slot: new.num_tokens for new in plan.new_sequences}
        if token_ids is None or [told.get(slot) for slot in plan.row_slots] != lengths or len(told) != len(lengths):
            raise ProtocolError(f"step plan {plan.step_id}: texts to embed are new and whole; these rows are not")
        limits = self.limits
        if max(lengths) > limits.max_model_len or sum(lengths) > limits.max_num_batched_tokens:
            raise ProtocolError(
                f"step plan {plan.step_id}: {sum(lengths)} tokens in texts of up to {max(lengths)}; at most "
                f"{limits.max_num_batched_tokens} in texts of {limits.max_model_len} were offered"
            )
        outside = (token_ids < 0) | (token_ids >= limits.vocab_size)
        if outside.any():
            token_id = int(token_ids[outside][0])
            raise ProtocolError(f"step plan {plan.step_id}: token id {token_id} is outside the vocabulary of {limits.vocab_size}")
        return lengths


class MockEmbedder:
    """Makes up vectors by a rule, for load tests without a model: the same tokens give the same vector of length 1."""

    def __init__(self, size: int) -> None:
        self._size = size

    def embed(self, token_ids: npt.NDArray[np.int32], row_lengths: Sequence[int]) -> npt.NDArray[np.float32]:
        """Compute one vector a row; see `Embeds`."""
        vectors = np.zeros((len(row_lengths), self._size), dtype=np.float32)
        start = 0
        for row, length in enumerate(row_lengths):
            np.add.at(vectors[row], token_ids[start : start + length] % self._size, 1.0)
            start += length
        lengths: npt.NDArray[np.float32] = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / lengths, dtype=np.float32)
