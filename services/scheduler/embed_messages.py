"""Between the wire's messages and the core that embeds. Pure; whatever a peer may have got wrong is found here."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items

import numpy as np
import numpy.typing as npt

from headrace.errors import InvalidRequestError, ProtocolError
from headrace.v1 import common_pb2 as common
from headrace.v1 import control_pb2 as control
from headrace.v1 import scheduler_pb2 as scheduler
from headrace.v1 import worker_pb2 as worker
from headrace.wire.envelope import float32_array, int32_array
from services.scheduler.embeddings import EmbedCapacity, EmbedRequest

_ROW_ERRORS = {scheduler.ROW_ERROR_NON_FINITE_VECTOR: "its vector held NaN or infinity"}


def embeds(capacity: control.Capacity | None) -> bool:
    """Whether a worker group is one for embedding."""
    return capacity is not None and control.WORK_KIND_EMBED in capacity.work_kinds


def embed_capacity(capacity: control.Capacity) -> EmbedCapacity:
    """What a worker group that embeds offers.

    Raises:
        ProtocolError: It has a size of zero, or does other work too.
    """
    found = EmbedCapacity(
        model=capacity.model.name,
        max_model_len=capacity.model.max_model_len,
        max_num_batched_tokens=capacity.max_num_batched_tokens,
        max_num_seqs=capacity.max_num_seqs,
        vocab_size=capacity.vocab_size,
        vector_size=capacity.model.embedding.size,
    )
    if not all((found.max_text_tokens, found.max_num_seqs, found.vocab_size, found.vector_size)):
        raise ProtocolError(f"a worker that embeds offers a size of zero: {found}")
    if list(capacity.work_kinds) != [control.WORK_KIND_EMBED]:
        raise ProtocolError(f"a worker that embeds does nothing else; work_kinds is {list(capacity.work_kinds)}")
    return found


def embed_request(
    submit: scheduler.Submit, frames: Items[memoryview], *, owner: int, now_ns: int, now_unix_ns: int
) -> EmbedRequest:
    """The text a Submit brings. Its deadline moves to the monotonic clock.

    Raises:
        ProtocolError: The frame or a count is wrong.
    """
    tokens = int32_array(frames[0] if frames else None, count=submit.num_tokens)
    if submit.num_output_tokens:
        raise ProtocolError(f"submit: a text to embed has {submit.num_output_tokens} output tokens")
    deadline_unix_ns = submit.work.deadline_unix_ns
    return EmbedRequest(
        request_id=submit.work.request_id,
        owner=owner,
        model=submit.model,
        tokens=array("i", tokens.astype(np.int32).tobytes()),
        # Zero would mean none.
        deadline_ns=max(1, now_ns + deadline_unix_ns - now_unix_ns) if deadline_unix_ns else 0,
    )


def check_tokens(request: EmbedRequest, vocab_sizes: dict[str, int]) -> None:
    """Refuse token ids outside the model's vocabulary, where that is known.

    Raises:
        InvalidRequestError: It names the token and the size.
    """
    size = vocab_sizes.get(request.model)
    outside = next((token for token in request.tokens if not 0 <= token < size), None) if size else None
    if outside is not None:
        raise InvalidRequestError(f"input: token id {outside} is outside the vocabulary of {size} tokens", param="input")


def step_plan(step_id: int, texts: Items[EmbedRequest], works: Items[common.WorkHeader]) -> tuple[worker.StepPlan, list[bytes]]:
    """A step's message and frames; `works` are the headers of its texts."""
    body = worker.StepPlan(step_id=step_id, row_slots=range(len(texts)), row_num_new_tokens=[len(text.tokens) for text in texts])
    for slot, (text, work) in enumerate(zip(texts, works, strict=True)):
        body.new_sequences.add(slot=slot, work=work, num_tokens=len(text.tokens))
    return body, [b"".join(text.tokens.tobytes() for text in texts)]


def vectors(result: scheduler.StepResult, frames: Items[memoryview], *, size: int) -> npt.NDArray[np.float32]:
    """The vectors of a step, `[num_slots, size]`.

    Raises:
        ProtocolError: They are of another size than the worker registered with, or not all there.
    """
    num_slots = len(result.slots)
    if num_slots and result.vector_size != size:
        raise ProtocolError(f"a worker that registered with vectors of {size} numbers sent {result.vector_size}")
    if not num_slots:
        return np.zeros((0, size), dtype=np.float32)
    return float32_array(frames[0] if frames else None, count=num_slots * size).reshape(num_slots, size)


def failures(result: scheduler.StepResult) -> dict[int, str]:
    """Why texts of a step failed, by their place in it."""
    reasons = zip(result.failed_slots, result.failed_reasons, strict=False)
    return {slot: _ROW_ERRORS.get(reason, f"the worker's reason is number {reason}") for slot, reason in reasons}
