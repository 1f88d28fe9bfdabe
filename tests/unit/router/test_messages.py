"""What a router tells the other services of a request."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.v1 import common_pb2 as common
from headrace.v1 import scheduler_pb2 as scheduler
from headrace.v1 import tokenizer_pb2 as tokenizer
from services.router import messages
from services.router.generation import (
    CONSTRAINT_KINDS,
    TOOL_CALLS_KIND,
    Constraint,
    EncodedPrompt,
    GenerationRequest,
    TextPrompt,
)
from tests.unit.router.test_open_request import Bench


@pytest.mark.parametrize("kind", [*CONSTRAINT_KINDS, TOOL_CALLS_KIND])
def test_a_constraint_goes_to_the_tokenizer_and_what_that_made_of_it_to_every_scheduler(kind: str) -> None:
    request = Bench().request
    request.generation = GenerationRequest("m", TextPrompt("hello"), constraint=Constraint(kind, "source", "response_format"))
    _, ask, _ = messages.tokenize(request, common.WorkHeader())
    assert ask.constraint == common.Constraint(kind=f"CONSTRAINT_KIND_{kind.upper()}", source="source")
    assert ask.constraint_param == "response_format"
    reply = tokenizer.TokenizeReply(num_tokens=5, grammar="start: /a/")
    request.encoded = messages.encoded_prompt(reply, np.arange(5, dtype=np.int32))
    request.output_tokens.extend([7, 8])
    for _ in range(2):
        _, submit, _ = messages.submit(request, common.WorkHeader(), seed=1, target=scheduler.DetokenizerTarget())
        assert submit.constraint == common.Constraint(kind=common.CONSTRAINT_KIND_GRAMMAR, source="start: /a/")
        assert submit.num_output_tokens == 2


def test_without_a_constraint_none_is_sent() -> None:
    request = Bench().request
    assert not messages.tokenize(request, common.WorkHeader())[1].HasField("constraint")
    request.encoded = EncodedPrompt(np.arange(5, dtype=np.int32))
    _, submit, _ = messages.submit(request, common.WorkHeader(), seed=1, target=scheduler.DetokenizerTarget())
    assert not submit.HasField("constraint")
