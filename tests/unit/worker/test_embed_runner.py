"""What a worker that embeds takes of a plan, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from headrace.errors import ProtocolError
from headrace.models.embedding_config import EmbeddingConfig
from headrace.v1.scheduler_pb2 import RowError
from headrace.v1.worker_pb2 import StepPlan
from services.worker.batch_inputs import Limits
from services.worker.embed_runner import EmbedRunner, MockEmbedder

SIZE = 2
NAN_TOKEN = 9


class LengthEmbedder:
    """Vectors [tokens, first token], or NaN for a text that begins with `NAN_TOKEN`."""

    def embed(self, token_ids: npt.NDArray[np.int32], row_lengths: Sequence[int]) -> npt.NDArray[np.float32]:
        ends = np.cumsum(row_lengths)
        firsts = token_ids[ends - row_lengths]
        vectors = np.stack([np.array(row_lengths), firsts], axis=1).astype(np.float32)
        vectors[firsts == NAN_TOKEN] = np.nan
        return vectors


def runner(**changes: Any) -> EmbedRunner:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 6, "num_pages": 0, "page_size": 1, "vocab_size": 50}
    return EmbedRunner(LengthEmbedder(), Limits(**(sizes | changes)), EmbeddingConfig(SIZE))


def plan(texts: dict[int, list[int]]) -> tuple[StepPlan, npt.NDArray[np.int32]]:
    body = StepPlan(step_id=3, row_slots=list(texts), row_num_new_tokens=[len(text) for text in texts.values()])
    for slot, text in texts.items():
        body.new_sequences.add(slot=slot, num_tokens=len(text))
    return body, np.array([token for text in texts.values() for token in text], dtype=np.int32)


def test_each_row_has_its_vector_and_a_bad_one_fails_alone() -> None:
    one = runner()
    result = one.step(*plan({0: [5, 6], 1: [NAN_TOKEN], 2: [7]}))
    assert (result.step_id, list(result.slots), result.vector_size) == (3, [0, 2], SIZE)
    assert (list(result.failed_slots), list(result.failed_reasons)) == ([1], [RowError.ROW_ERROR_NON_FINITE_VECTOR])
    assert np.frombuffer(one.take_vectors(), dtype="<f4").tolist() == [2, 5, 1, 7]
    assert one.take_vectors() == b"", "taken once"
    assert one.num_sequences == 0


def test_a_plan_without_rows_is_answered() -> None:
    one = runner()
    assert not one.step(StepPlan(step_id=1), None).slots
    assert one.take_vectors() == b""


def test_a_text_longer_than_a_step_is_not_offered() -> None:
    assert runner(max_model_len=512).limits.max_model_len == 8


@pytest.mark.parametrize(
    ("texts", "changes", "words"),
    [
        ({0: [1] * 7}, {}, "7 tokens in texts of up to 7; at most 8 in texts of 6"),
        ({0: [1] * 5, 1: [2] * 5}, {}, "10 tokens"),
        ({0: [50]}, {}, "token id 50 is outside the vocabulary of 50"),
        ({0: [1, 2]}, {"row_num_new_tokens": [1]}, "new and whole"),
        ({0: [1, 2]}, {"row_slots": [1]}, "new and whole"),
    ],
)
def test_a_plan_that_is_none_of_whole_texts_is_refused(texts: dict[int, list[int]], changes: dict[str, Any], words: str) -> None:
    body, tokens = plan(texts)
    for name, value in changes.items():
        getattr(body, name)[:] = value
    with pytest.raises(ProtocolError, match=words):
        runner().step(body, tokens)


def test_mock_vectors_have_length_one_and_depend_on_the_text_alone() -> None:
    mock = MockEmbedder(8)
    beside = mock.embed(np.array([1, 2, 3, 9, 9], dtype=np.int32), [3, 2])
    alone = mock.embed(np.array([1, 2, 3], dtype=np.int32), [3])
    np.testing.assert_allclose(beside[0], alone[0])
    np.testing.assert_allclose(np.linalg.norm(beside, axis=1), 1.0, rtol=1e-6)
