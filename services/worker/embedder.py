"""From token ids to vectors: what a worker does for texts that are to be embedded. It holds nothing between calls.

Rows are whole: an encoder's tokens attend to those after them too, so a text is not computed in parts, and nothing of it is kept.
How such rows will come over the wire: docs/decisions/0007-embeddings.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from headrace.errors import InvalidRequestError
from services.worker.layers.ops import EncoderNetwork, StepTensors

_NOTHING = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class EmbedLimits:
    """Sizes that an encoder is made for, in tokens."""

    max_model_len: int
    vocab_size: int


class Embedder:
    """Computes vectors.

    Args:
        network: The encoder.
        limits: Its sizes.
    """

    def __init__(self, network: EncoderNetwork, limits: EmbedLimits) -> None:
        self._network = network
        self.limits = limits

    def embed(self, token_ids: npt.NDArray[np.int32], row_lengths: Sequence[int]) -> npt.NDArray[np.float32]:
        """Compute one vector a row.

        Args:
            token_ids: All rows' tokens, one row after another.
            row_lengths: Tokens of each row.

        Returns:
            `[num_rows, size]`.

        Raises:
            InvalidRequestError: A row is empty or too long, or a token is not in the vocabulary.
        """
        counts = np.array(row_lengths, dtype=np.int64)
        self._check(token_ids, counts)
        if len(counts) == 0:
            return np.zeros((0, 0), dtype=np.float32)
        starts = np.repeat(counts.cumsum() - counts, counts)
        step = StepTensors(
            token_ids=torch.from_numpy(token_ids.astype(np.int64)),
            positions=torch.from_numpy(np.arange(len(token_ids)) - starts),
            slot_mapping=_NOTHING,
            row_starts=torch.zeros(len(counts), dtype=torch.int64),
            row_counts=torch.from_numpy(counts),
            page_tables=torch.zeros((len(counts), 0), dtype=torch.int64),
            num_decode_rows=0,
            sampled_tokens=_NOTHING,
        )
        with torch.inference_mode():
            # A copy: the network's own is valid until the next step.
            return np.array(self._network.encode(step).numpy())

    def _check(self, token_ids: npt.NDArray[np.int32], counts: npt.NDArray[np.int64]) -> None:
        limits = self.limits
        if counts.sum() != len(token_ids):
            raise InvalidRequestError(f"rows have {counts.sum()} tokens, {len(token_ids)} came", param="row_lengths")
        bad = counts[(counts < 1) | (counts > limits.max_model_len)]
        if len(bad):
            raise InvalidRequestError(f"a row has {bad[0]} tokens; 1 to {limits.max_model_len} are allowed", param="row_lengths")
        if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < limits.vocab_size:
            raise InvalidRequestError(f"a token is not from 0 to {limits.vocab_size - 1}", param="token_ids")
