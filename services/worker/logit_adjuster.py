"""What changes a row's logits before it is sampled: penalties, then biases, then stop tokens that may not come yet.

Which tokens a sequence has, and how often, is kept in arrays, a row for each sequence that is penalised, to which a step adds one
number. A row that asks for none of this costs nothing, and a step without such rows three comparisons.

The repetition penalty looks at prompt and outputs, the others at the outputs: a logit is divided by the repetition penalty where it
is positive and multiplied where it is not, then loses `frequency * count` and, where the count is not 0, `presence`.

Source: frequency and presence, OpenAI's API reference; repetition, CTRL (Keskar et al., 2019), section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from headrace.v1.common_pb2 import SamplingParams
from headrace.v1.worker_pb2 import NewSequence
from services.worker.sampling_table import SampledRows, is_penalised, repetition_penalty

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_NO_ROWS: Final = np.zeros(0, dtype=np.int64)
_WIDTH_MIN: Final = 256


class LogitAdjuster:
    """State of all slots; see `LogitAdjustment`.

    Args:
        num_slots: Slots are below it.
        vocab_size: Tokens are below it.
    """

    def __init__(self, num_slots: int, vocab_size: int) -> None:
        self._penalties = _Penalties(num_slots, vocab_size)
        self._biases = _TokenLists(num_slots)
        self._barred = _TokenLists(num_slots)
        # Tokens at positions below this one may not be one of those barred.
        self._barred_until = np.zeros(num_slots, dtype=np.int64)
        self._vocab_size = vocab_size

    def enter(self, sequence: NewSequence, tokens: Int32Array) -> None:
        """Take a new sequence up, with all its tokens; what it asks for has been found to be in range."""
        slot, sampling = sequence.slot, sequence.sampling
        self.leave((slot,))
        biases = {entry.token_id: entry.bias for entry in sampling.logit_bias}
        num_prompt_tokens = len(tokens) - sequence.num_output_tokens
        self._penalties.enter(slot, sampling, tokens, num_prompt_tokens)
        if biases:
            self._biases.put(slot, list(biases), list(biases.values()))
        # A grammar leads: where it allows nothing but the end, nothing would be left.
        if sequence.num_output_tokens < sequence.min_output_tokens and not sequence.HasField("constrained"):
            barred = sorted({token_id for token_id in sequence.stop_token_ids if token_id < self._vocab_size})
            self._barred.put(slot, barred, [0.0] * len(barred))
            self._barred_until[slot] = num_prompt_tokens + sequence.min_output_tokens

    def leave(self, slots: Sequence[int]) -> None:
        """Forget the sequences of some slots, where there are any."""
        self._penalties.leave(slots)
        self._biases.drop(slots)
        self._barred.drop(slots)

    def reset(self) -> None:
        """Forget every sequence."""
        self._penalties.reset()
        self._biases.reset()
        self._barred.reset()

    def adjust(self, logits: torch.Tensor, rows: SampledRows) -> Int64Array:
        """Change the logits of rows whose sequences ask for it; gives which those are."""
        changed = []
        if self._penalties.num_held:
            changed.append(self._penalties.adjust(logits, rows.slots))
        if self._biases.num_held:
            indices, token_ids, biases = self._biases.gather(rows.slots, np.arange(len(rows.slots)))
            values = torch.from_numpy(biases).to(logits.device)
            places = (_tensor(indices, logits), _tensor(token_ids, logits))
            logits.index_put_(places, values, accumulate=True)
            changed.append(indices)
        if self._barred.num_held:
            (early,) = np.nonzero(rows.positions < self._barred_until[rows.slots])
            indices, token_ids, _ = self._barred.gather(rows.slots[early], early)
            logits[_tensor(indices, logits), _tensor(token_ids, logits)] = -torch.inf
            changed.append(indices)
        return np.unique(np.concatenate(changed)) if changed else _NO_ROWS

    def commit(self, slots: Int64Array, token_ids: Int64Array) -> None:
        """Sequences of these slots, each named once, have got a token each."""
        if self._penalties.num_held:
            self._penalties.commit(slots, token_ids)


class _Penalties:
    """Sequences with penalties: for each a row of the tokens it has, and how often each stands in the output.

    Only those tokens are looked at in a step. Where one stands in its sequence's row is found in an array over the vocabulary.
    """

    def __init__(self, num_slots: int, vocab_size: int) -> None:
        self._row_of = np.full(num_slots, -1, dtype=np.int64)
        self._frequency = np.zeros(num_slots, dtype=np.float32)
        self._presence = np.zeros(num_slots, dtype=np.float32)
        self._repetition = np.ones(num_slots, dtype=np.float32)
        # [num_rows, width]: the tokens, and their counts; [num_rows, vocab_size]: where each stands, or -1.
        self._token_ids = np.zeros((0, _WIDTH_MIN), dtype=np.int64)
        self._counts = np.zeros((0, _WIDTH_MIN), dtype=np.float32)
        self._places = np.zeros((0, vocab_size), dtype=np.int32)
        self._num_tokens = np.zeros(0, dtype=np.int64)
        self._free_rows: list[int] = []

    @property
    def num_held(self) -> int:
        """Sequences with penalties."""
        return len(self._num_tokens) - len(self._free_rows)

    def enter(self, slot: int, sampling: SamplingParams, tokens: Int32Array, num_prompt_tokens: int) -> None:
        if not is_penalised(sampling):
            return
        if not self._free_rows:
            self._grow()
        row = self._free_rows.pop()
        self._row_of[slot] = row
        self._frequency[slot] = sampling.frequency_penalty
        self._presence[slot] = sampling.presence_penalty
        self._repetition[slot] = repetition_penalty(sampling)
        # Of the prompt only a repetition penalty asks.
        known = tokens if self._repetition[slot] != 1.0 else tokens[num_prompt_tokens:]
        token_ids = np.unique(known)
        self._widen(len(token_ids))
        self._num_tokens[row] = len(token_ids)
        self._token_ids[row, : len(token_ids)] = token_ids
        self._places[row] = -1
        self._places[row, token_ids] = np.arange(len(token_ids))
        self._counts[row] = 0
        np.add.at(self._counts[row], self._places[row, tokens[num_prompt_tokens:]], 1)

    def leave(self, slots: Sequence[int]) -> None:
        for slot in slots if self.num_held else ():
            if self._row_of[slot] >= 0:
                self._free_rows.append(int(self._row_of[slot]))
                self._row_of[slot] = -1

    def reset(self) -> None:
        self._row_of[:] = -1
        self._free_rows = list(range(len(self._num_tokens)))

    def adjust(self, logits: torch.Tensor, slots: Int64Array) -> Int64Array:
        (indices,) = np.nonzero(self._row_of[slots] >= 0)
        slots = slots[indices]
        rows = self._row_of[slots]
        num_tokens = self._num_tokens[rows]
        num_entries = int(num_tokens.sum())
        if not num_entries:
            return indices
        is_token = np.arange(int(num_tokens.max())) < num_tokens[:, None]
        width = is_token.shape[1]
        counts = torch.from_numpy(self._counts[rows, :width][is_token]).to(logits.device)
        places = (
            _tensor(np.repeat(indices, num_tokens), logits),
            _tensor(self._token_ids[rows, :width][is_token], logits),
        )
        frequency, presence, repetition = (
            torch.from_numpy(np.repeat(values[slots], num_tokens)).to(logits.device)
            for values in (self._frequency, self._presence, self._repetition)
        )
        chosen = logits[places]
        chosen = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
        logits[places] = chosen - frequency * counts - presence * (counts > 0)
        return indices

    def commit(self, slots: Int64Array, token_ids: Int64Array) -> None:
        rows = self._row_of[slots]
        is_held = rows >= 0
        rows, token_ids = rows[is_held], token_ids[is_held]
        is_new = self._places[rows, token_ids] < 0
        if is_new.any():
            new_rows, new_ids = rows[is_new], token_ids[is_new]
            ends = self._num_tokens[new_rows]
            self._widen(int(ends.max()) + 1)
            self._token_ids[new_rows, ends] = new_ids
            self._counts[new_rows, ends] = 0
            self._places[new_rows, new_ids] = ends
            self._num_tokens[new_rows] = ends + 1
        self._counts[rows, self._places[rows, token_ids]] += 1

    def _grow(self) -> None:
        """Double the rows: they are made when first wanted, for they are as long as the vocabulary."""
        num_rows = len(self._num_tokens)
        num_new = max(1, num_rows)
        self._token_ids, self._counts, self._places = (
            np.concatenate((values, np.zeros((num_new, values.shape[1]), dtype=values.dtype)))
            for values in (self._token_ids, self._counts, self._places)
        )
        self._num_tokens = np.concatenate((self._num_tokens, np.zeros(num_new, dtype=np.int64)))
        self._free_rows += range(num_rows, num_rows + num_new)

    def _widen(self, width: int) -> None:
        """Make room for so many tokens a row."""
        if width > self._counts.shape[1]:
            num_more = max(width, 2 * self._counts.shape[1]) - self._counts.shape[1]
            self._token_ids = np.pad(self._token_ids, ((0, 0), (0, num_more)))
            self._counts = np.pad(self._counts, ((0, 0), (0, num_more)))


class _TokenLists:
    """Some tokens of some slots with a number each, flat, so that any rows' are gathered without a loop."""

    def __init__(self, num_slots: int) -> None:
        self._lists: dict[int, tuple[Sequence[int], Sequence[float]]] = {}
        self._starts = np.zeros(num_slots, dtype=np.int64)
        self._counts = np.zeros(num_slots, dtype=np.int64)
        self._token_ids = np.zeros(0, dtype=np.int64)
        self._values = np.zeros(0, dtype=np.float32)

    @property
    def num_held(self) -> int:
        """Slots with a list."""
        return len(self._lists)

    def put(self, slot: int, token_ids: Sequence[int], values: Sequence[float]) -> None:
        """Keep a slot's list."""
        self._lists[slot] = token_ids, values
        self._flatten()

    def drop(self, slots: Sequence[int]) -> None:
        """Forget the lists of slots, where there are any."""
        dropped = [slot for slot in slots if self._lists.pop(slot, None) is not None] if self._lists else ()
        if dropped:
            self._flatten()

    def reset(self) -> None:
        """Forget all."""
        self._lists.clear()
        self._flatten()

    def gather(self, slots: Int64Array, indices: Int64Array) -> tuple[Int64Array, Int64Array, npt.NDArray[np.float32]]:
        """The lists of some slots behind one another: the index of the row that each entry is of, tokens, numbers."""
        counts = self._counts[slots]
        ends = np.cumsum(counts)
        num_entries = int(ends[-1]) if len(ends) else 0
        places = np.arange(num_entries) + np.repeat(self._starts[slots] - (ends - counts), counts)
        return np.repeat(indices, counts), self._token_ids[places], self._values[places]

    def _flatten(self) -> None:
        self._counts[:] = 0
        start = 0
        for slot, (token_ids, _) in self._lists.items():
            self._starts[slot], self._counts[slot] = start, len(token_ids)
            start += len(token_ids)
        self._token_ids = np.array([token_id for token_ids, _ in self._lists.values() for token_id in token_ids], dtype=np.int64)
        self._values = np.array([value for _, values in self._lists.values() for value in values], dtype=np.float32)


def _tensor(values: Int64Array, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device)
