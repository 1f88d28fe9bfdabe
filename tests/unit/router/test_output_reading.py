"""Reasoning and tool calls between detokenizer and client: counts, ids, how a stream is to be read, and a spent budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from headrace.errors import ProtocolError
from headrace.v1 import common_pb2 as common
from headrace.v1 import detokenizer_pb2 as detokenizer
from headrace.v1 import router_pb2 as router
from services.router import messages
from services.router.actions import Deliver, End, SendOpenStream, SendSubmit
from services.router.directory import Directory, Instance
from services.router.generation import (
    ChatTurn,
    ConversationPrompt,
    EncodedPrompt,
    GenerationRequest,
    ModelOffer,
    OutputFormats,
    ReasoningOptions,
    Stopping,
    Tool,
    ToolCallDelta,
    ToolChoice,
)
from services.router.open_request import Kind, OpenRequest, Output, Patience
from services.router.places import DETOKENIZER, SCHEDULER, TOKENIZER
from services.router.policies.choice import least_loaded
from services.router.streams import Streams

SECOND = 1_000_000_000
FORMATS = OutputFormats("hermes", "qwen3", True, (50, 51))
PROMPT = EncodedPrompt(np.array([1, 2, 3], dtype=np.int32), 100, formats=FORMATS)
CONVERSATION = ConversationPrompt((ChatTurn("user", "hi"),), tools=(Tool("now"),))
STOP = common.FINISH_REASON_STOP


class Bench:
    """A request that streams, in its table."""

    def __init__(self, prompt: EncodedPrompt = PROMPT, **fields: Any) -> None:
        directory = Directory(least_loaded, stuck_after_ns=SECOND)
        for role, incarnation in ((TOKENIZER, 10), (SCHEDULER, 20), (DETOKENIZER, 30)):
            directory.add(Instance(role, incarnation, str(incarnation), "", {"m": ModelOffer("m", 100, 1)}), 0)
        self.request = OpenRequest(
            "r",
            kind=Kind.GENERATE,
            generation=GenerationRequest("m", CONVERSATION, **fields),
            stream_id=7,
            deadline_ns=100 * SECOND,
            placement=directory,
            patience=Patience(10 * SECOND, 30 * SECOND, 15 * SECOND, SECOND // 5, 8),
        )
        self.streams = Streams()
        self.streams.open(self.request, 0)
        self.streams.on_tokenized("r", 10, prompt, 0)

    def reading(self) -> detokenizer.OpenStream:
        _, body, _ = messages.open_stream(self.request, common.WorkHeader())
        assert isinstance(body, detokenizer.OpenStream)
        return body


def spent(position: int, *token_ids: int) -> Output:
    return Output(position, token_ids, "", STOP, reasoning="hm", num_reasoning_tokens=4, is_budget_spent=True)


def test_tool_calls_end_a_stream_that_stopped() -> None:
    bench = Bench()
    call = ToolCallDelta(0, "{", "", "now")
    (deliver,) = bench.request.on_output(30, Output(0, (5,), "", tool_calls=(call,)), 0)
    assert isinstance(deliver, Deliver)
    assert deliver.piece.tool_calls[0].id.startswith("call_")
    rest = Output(1, (6,), "", STOP, tool_calls=(ToolCallDelta(0, "}"),))
    deliver, end = bench.request.on_output(30, rest, 0)
    assert isinstance(deliver, Deliver)
    assert isinstance(end, End)
    assert deliver.piece.finish_reason == "tool_calls"
    cut = Bench()
    cut.request.on_output(30, Output(0, (5,), "", tool_calls=(call,)), 0)
    (deliver, _) = cut.request.on_output(30, Output(1, (6,), "", common.FINISH_REASON_LENGTH), 0)
    assert isinstance(deliver, Deliver)
    assert deliver.piece.finish_reason == "length"


def test_a_stream_says_how_it_is_to_be_read_and_what_was_sent() -> None:
    bench = Bench(reasoning=ReasoningOptions(is_streamed=False, budget_tokens=9))
    reading = bench.reading().reading
    assert (reading.formats.tool_format, reading.formats.reasoning_format, reading.formats.starts_in_reasoning) == (
        "hermes",
        "qwen3",
        True,
    )
    assert (reading.holds_reasoning, reading.keeps_reasoning_in_text, reading.reasoning_budget) == (True, False, 9)
    assert '"now"' in reading.tools
    calls = (ToolCallDelta(0, "{}", "", "now"), ToolCallDelta(1, "{", "", "now"))
    bench.request.on_output(30, Output(0, (5,), "abc", reasoning="hm", num_reasoning_tokens=1, tool_calls=calls), 0)
    body = bench.reading()
    assert (body.num_sent_chars, body.sent.num_reasoning_chars) == (3, 2)
    assert (body.sent.num_tool_calls, body.sent.num_argument_chars) == (2, 3)


def test_without_tools_or_reasoning_nothing_is_read() -> None:
    assert not Bench(replace(PROMPT, formats=OutputFormats())).reading().HasField("reading")
    none = Bench(tool_choice=ToolChoice("none")).reading().reading
    assert (none.formats.tool_format, none.formats.reasoning_format, none.tools) == ("", "qwen3", "")


@pytest.mark.parametrize(
    ("formats", "read"),
    [
        (FORMATS, ("json", "qwen3", True)),
        (OutputFormats("hermes"), ("json", "", False)),
        # No block, but channels: the calls are all of the output.
        (OutputFormats("gpt_oss", "gpt_oss"), ("json", "", False)),
    ],
)
def test_calls_that_a_grammar_forces_are_read_as_json_behind_reasoning(formats: OutputFormats, read: tuple[str, str, bool]) -> None:
    reading = Bench(replace(PROMPT, formats=formats), tool_choice=ToolChoice("required")).reading().reading
    assert (reading.formats.tool_format, reading.formats.reasoning_format, reading.formats.starts_in_reasoning) == read


def test_a_spent_budget_goes_on_behind_the_end_of_the_block_as_another_stream() -> None:
    bench = Bench(reasoning=ReasoningOptions(budget_tokens=4))
    bench.streams.on_output(7, 30, Output(0, (5, 6), "", reasoning="h", num_reasoning_tokens=2), 0)
    deliver, opened, submitted = bench.streams.on_output(7, 30, spent(2, 8, 9), 0)
    assert isinstance(deliver, Deliver)
    assert (deliver.piece.token_ids, deliver.piece.finish_reason) == ((8, 9, 50, 51), None)
    assert isinstance(opened, SendOpenStream)
    assert isinstance(submitted, SendSubmit)
    assert list(bench.request.output_tokens) == [5, 6, 8, 9, 50, 51]
    body = bench.reading()
    assert (body.stream_id, body.num_output_tokens, body.sent.num_reasoning_chars) == (8, 6, 3)
    assert not body.reading.HasField("reasoning_budget")
    assert bench.streams.on_output(7, 30, Output(4, (60,), "late"), 0) == []
    (deliver, _) = bench.streams.on_output(8, 30, Output(6, (61,), "so", STOP, num_reasoning_tokens=6), 0)
    assert isinstance(deliver, Deliver)
    assert (deliver.piece.text, deliver.piece.finish_reason) == ("so", "stop")
    assert bench.request.read.num_reasoning_tokens == 6
    assert len(bench.streams) == 0


@pytest.mark.parametrize("fields", [{"stopping": Stopping(max_tokens=6)}, {"prompt": replace(PROMPT, max_model_len=9)}])
def test_a_spent_budget_without_room_for_an_answer_ends_by_length(fields: dict[str, Any]) -> None:
    bench = Bench(reasoning=ReasoningOptions(budget_tokens=4), **fields)
    deliver, end = bench.streams.on_output(7, 30, spent(0, 5, 6, 8, 9), 0)
    assert isinstance(deliver, Deliver)
    assert isinstance(end, End)
    assert (deliver.piece.token_ids, deliver.piece.finish_reason, end.error) == ((5, 6, 8, 9), "length", None)


def test_a_format_that_cannot_be_ended_has_no_budget() -> None:
    formats = replace(FORMATS, reasoning_end_token_ids=())
    reading = Bench(replace(PROMPT, formats=formats), reasoning=ReasoningOptions(budget_tokens=4)).reading().reading
    assert not reading.HasField("reasoning_budget")


def test_deltas_carry_what_was_read_by_stream() -> None:
    deltas = router.OutputDeltas(
        stream_ids=[1, 2],
        first_positions=[0, 4],
        token_ids=[5, 6],
        texts=["a", "b"],
        reasonings=["", "hm"],
        num_reasoning_tokens=[0, 3],
        tool_calls=router.ToolCallDeltas(
            num_deltas=[1, 2], indexes=[0, 0, 1], names=["f", "", "g"], arguments=["", "}", ""], ids=["", "", "i"]
        ),
    )
    (_, first), (_, second) = messages.outputs(deltas)
    assert (first.reasoning, first.num_reasoning_tokens, first.tool_calls) == ("", 0, (ToolCallDelta(0, "", "", "f"),))
    assert (second.reasoning, second.num_reasoning_tokens) == ("hm", 3)
    assert second.tool_calls == (ToolCallDelta(0, "}"), ToolCallDelta(1, "", "i", "g"))
    deltas.tool_calls.names.append("h")
    with pytest.raises(ProtocolError, match="tool calls"):
        list(messages.outputs(deltas))
