"""Streams whose text is read for reasoning and tool calls: token borders, streams begun again, rewound, stopped at a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from headrace.errors import ProtocolError
from headrace.v1.common_pb2 import FinishReason
from headrace.v1.detokenizer_pb2 import OpenStream
from headrace.v1.router_pb2 import OutputDeltas
from services.detokenizer.messages import output_deltas, stream_start
from services.detokenizer.parsers.output_parser import ReadingOptions
from services.detokenizer.stream_reader import SentCounts
from services.detokenizer.streams import Batch, BatchEffects, StreamLimits, StreamStart, StreamTable
from services.detokenizer.token_table import TokenTable
from tests.unit.detokenizer.parser_corpus import CASES, TOOLS, Case

ROUTER, SCHEDULER, STREAM = 1, 2, 7
NONE, STOP = FinishReason.FINISH_REASON_UNSPECIFIED, FinishReason.FINISH_REASON_STOP
QWEN = ReadingOptions("hermes", "qwen3", False, TOOLS)
OUTPUT = (
    "<think>\nA 日本 question.\n</think>\n\nLook: 日\n<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "日本"}}\n</tool_call>\n<tool_call>{"name": "now"}</tool_call>'
)


@dataclass
class Router:
    """What a router has of the stream, counted as it counts."""

    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    num_tokens: int = 0
    num_reasoning_tokens: int = 0
    is_budget_spent: bool = False
    finish: int = 0

    @property
    def sent(self) -> SentCounts:
        return SentCounts(len(self.reasoning), len(self.calls), sum(len(arguments) for _, arguments in self.calls))

    def read(self, streams: StreamTable) -> None:
        arrays = streams.outbox(ROUTER).deltas()
        if arrays is not None:
            self.take(output_deltas(arrays, enqueued_unix_ns=1))
            streams.mark_sent(ROUTER)

    def take(self, deltas: OutputDeltas) -> None:
        assert deltas.first_positions[0] == self.num_tokens
        self.num_tokens += len(deltas.token_ids)
        self.text += deltas.texts[0]
        if deltas.reasonings:
            self.reasoning += deltas.reasonings[0]
        if deltas.num_reasoning_tokens:
            self.num_reasoning_tokens = deltas.num_reasoning_tokens[0]
        parts = deltas.tool_calls
        assert len(parts.indexes) == sum(parts.num_deltas)
        for index, name, arguments in zip(parts.indexes, parts.names, parts.arguments, strict=True):
            if index == len(self.calls):
                self.calls.append([name, ""])
            self.calls[index][1] += arguments
        self.is_budget_spent = any(deltas.is_budget_spent)
        self.finish = deltas.finish_reasons[0] if deltas.finish_reasons else 0


@pytest.fixture
def table(tables_by_kind: dict[str, TokenTable]) -> TokenTable:
    return tables_by_kind["byte_level"]


def encode(table: TokenTable, text: str) -> list[int]:
    """Longest pieces first, so that some tokens hold several characters and some a part of one."""
    data, ids = text.encode(), []
    while data:
        best = max((piece for piece in table.pieces if piece and data.startswith(piece)), key=len)
        ids.append(table.pieces.index(best))
        data = data[len(best) :]
    return ids


def give(streams: StreamTable, position: int, token_ids: Sequence[int], finish: FinishReason = NONE) -> BatchEffects:
    batch = Batch([STREAM], [position], list(token_ids), [len(token_ids)], [finish])
    batch.check()
    return streams.apply(batch, source=SCHEDULER, now_ns=0)


def open_stream(streams: StreamTable, options: ReadingOptions, **start: object) -> BatchEffects:
    return streams.open(StreamStart(STREAM, reading=options, **start), owner=ROUTER, now_ns=0)  # type: ignore[arg-type]


def whole(table: TokenTable, options: ReadingOptions, ids: Sequence[int]) -> Router:
    streams, router = StreamTable(table, StreamLimits()), Router()
    open_stream(streams, options)
    give(streams, 0, ids, STOP)
    router.read(streams)
    return router


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_token_borders_change_nothing(table: TokenTable, case: Case) -> None:
    ids = encode(table, case.output)
    once = whole(table, case.options, ids)
    assert (once.text, once.reasoning, len(once.calls)) == (case.text, case.reasoning, len(case.calls))
    streams, router = StreamTable(table, StreamLimits()), Router()
    open_stream(streams, case.options)
    for position, token_id in enumerate(ids):
        give(streams, position, [token_id])
        router.read(streams)
    give(streams, len(ids), [], STOP)
    router.read(streams)
    assert router == once


@pytest.mark.parametrize(("finish", "arguments"), [(STOP, "{}"), (FinishReason.FINISH_REASON_LENGTH, "")])
def test_a_call_that_ends_before_its_arguments_has_none_unless_it_was_cut(
    table: TokenTable, finish: FinishReason, arguments: str
) -> None:
    """The end token that the model ends a call by makes no text (GPT-OSS's <|call|>)."""
    options = ReadingOptions("gpt_oss", "gpt_oss", False, TOOLS)
    ids = encode(table, "<|channel|>commentary to=functions.now<|message|>")
    streams, router = StreamTable(table, StreamLimits()), Router()
    open_stream(streams, options)
    give(streams, 0, ids)
    give(streams, len(ids), [], finish)
    router.read(streams)
    assert router.calls == [["now", arguments]]


@pytest.mark.parametrize("options", [QWEN, replace(QWEN, holds_reasoning=True)], ids=["streamed", "held"])
def test_a_stream_begun_again_anywhere_sends_nothing_twice(table: TokenTable, options: ReadingOptions) -> None:
    ids = encode(table, OUTPUT)
    once = whole(table, options, ids)
    assert once.calls == [["get_weather", '{"city": "日本"}'], ["now", "{}"]]
    assert (once.reasoning, once.text) == ("A 日本 question.", "Look: 日")
    for border in range(len(ids)):
        router = Router()
        streams = StreamTable(table, StreamLimits())
        open_stream(streams, options)
        give(streams, 0, ids[:border])
        router.read(streams)
        other = StreamTable(table, StreamLimits())
        open_stream(
            other,
            options,
            history=[*encode(table, "prompt"), *ids[:border]],
            num_output_tokens=border,
            num_sent_chars=len(router.text),
            sent=router.sent,
        )
        router.read(other)
        give(other, border, ids[border:], STOP)
        router.read(other)
        assert router == once, border


def test_a_router_that_does_not_read_gets_all_of_it_later(table: TokenTable) -> None:
    ids = encode(table, OUTPUT)
    once = whole(table, QWEN, ids)
    for border in range(1, len(ids) - 4, 3):
        streams, router = StreamTable(table, StreamLimits(unsent_tokens_max=2)), Router()
        open_stream(streams, QWEN)
        give(streams, 0, ids[:border])
        streams.mark_unsent(ROUTER)
        give(streams, border, ids[border : border + 4])
        assert streams.mark_unsent(ROUTER) == 1
        router.read(streams)
        assert router.num_tokens == border
        give(streams, border, ids[border:], STOP)
        router.read(streams)
        assert router == once, border


def test_reasoning_tokens_are_counted_with_their_marks(table: TokenTable) -> None:
    ids = encode(table, "<think>why</think>so")
    assert whole(table, ReadingOptions("", "qwen3"), ids).num_reasoning_tokens == len(encode(table, "why</think>")) + 1
    assert whole(table, ReadingOptions("", "qwen3", True), encode(table, "why")).num_reasoning_tokens == 3


def test_a_spent_budget_stops_the_stream_at_its_token(table: TokenTable) -> None:
    options = ReadingOptions("", "deepseek_r1", True, reasoning_budget=5)
    streams, router = StreamTable(table, StreamLimits()), Router()
    open_stream(streams, options)
    effects = give(streams, 0, encode(table, "thinking on"))
    router.read(streams)
    assert effects.stops == {SCHEDULER: [STREAM]}
    assert (router.num_tokens, router.num_reasoning_tokens, router.finish, router.is_budget_spent) == (5, 5, STOP, True)
    assert router.reasoning == "think"


def test_a_budget_that_is_not_reached_changes_nothing(table: TokenTable) -> None:
    options = ReadingOptions("", "deepseek_r1", True, reasoning_budget=11)
    router = whole(table, options, encode(table, "why</think>so"))
    assert (router.text, router.num_reasoning_tokens, router.is_budget_spent) == ("so", 11, False)


def test_special_tokens_that_mark_something_are_read_and_others_skipped(tables_by_kind: dict[str, TokenTable]) -> None:
    base = tables_by_kind["byte_level"]
    # The fixture's special token stands in for a model's own marker.
    marker = base.texts.index("<|end|>")
    (other,) = base.special_ids - {marker}
    ids = [*encode(base, "<|channel|>analysis<|message|>why"), other, marker, *encode(base, "<|start|>assistant<|channel|>final")]
    router = whole(base, ReadingOptions("", "gpt_oss"), [*ids, *encode(base, "<|message|>so"), other])
    assert (router.reasoning, router.text) == ("why", "so")


def test_a_stream_of_unknown_format_is_not_opened(table: TokenTable) -> None:
    streams = StreamTable(table, StreamLimits())
    with pytest.raises(ProtocolError, match="nobody"):
        open_stream(streams, ReadingOptions("nobody"))
    assert len(streams) == 0


def test_a_stream_is_opened_as_the_message_says() -> None:
    body = OpenStream(stream_id=STREAM, num_sent_chars=3)
    assert stream_start(body, None).reading is None
    body.reading.formats.tool_format = "hermes"
    body.reading.formats.starts_in_reasoning = True
    body.reading.tools = TOOLS
    body.reading.holds_reasoning = True
    body.sent.num_tool_calls = 2
    start = stream_start(body, None)
    assert start.reading == ReadingOptions("hermes", "", True, TOOLS, holds_reasoning=True)
    assert start.sent == SentCounts(0, 2, 0)
    body.reading.reasoning_budget = 0
    assert stream_start(body, None).reading == replace(start.reading, reasoning_budget=0)
