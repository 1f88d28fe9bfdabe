"""Protobuf bodies to and from the detokenizer's own types. Pure."""

from __future__ import annotations

from headrace.errors import ProtocolError
from headrace.v1.detokenizer_pb2 import OpenStream, OutputReading
from headrace.v1.router_pb2 import OutputDeltas, ToolCallDeltas
from headrace.wire.envelope import int32_array
from services.detokenizer.outbox import DeltaArrays, ReadArrays
from services.detokenizer.parsers.output_parser import ReadingOptions
from services.detokenizer.stream_reader import SentCounts
from services.detokenizer.streams import StreamStart


def stream_start(body: OpenStream, history: memoryview | None) -> StreamStart:
    """What a router says when it opens a stream.

    Raises:
        ProtocolError: The history holds what is no token id.
    """
    token_ids: list[int] = int32_array(history).tolist() if history is not None else []
    if token_ids and min(token_ids) < 0:
        raise ProtocolError(f"open_stream: the history holds the token id {min(token_ids)}")
    sent = body.sent
    return StreamStart(
        stream_id=body.stream_id,
        stops=list(body.stopping.stop),
        include_stop=body.stopping.include_stop_in_output,
        skip_special_tokens=body.skip_special_tokens if body.HasField("skip_special_tokens") else True,
        history=token_ids,
        num_output_tokens=body.num_output_tokens,
        num_sent_chars=body.num_sent_chars,
        reading=_reading_options(body.reading) if body.HasField("reading") else None,
        sent=SentCounts(sent.num_reasoning_chars, sent.num_tool_calls, sent.num_argument_chars),
    )


def _reading_options(reading: OutputReading) -> ReadingOptions:
    formats = reading.formats
    return ReadingOptions(
        tool_format=formats.tool_format,
        reasoning_format=formats.reasoning_format,
        starts_in_reasoning=formats.starts_in_reasoning,
        tools=reading.tools,
        keeps_reasoning_in_text=reading.keeps_reasoning_in_text,
        holds_reasoning=reading.holds_reasoning,
        reasoning_budget=reading.reasoning_budget if reading.HasField("reasoning_budget") else None,
    )


def output_deltas(deltas: DeltaArrays, *, enqueued_unix_ns: int) -> OutputDeltas:
    """What waits for a router, as one message."""
    message = OutputDeltas(
        stream_ids=deltas.stream_ids,
        first_positions=deltas.first_positions,
        num_tokens=deltas.num_tokens,
        token_ids=deltas.token_ids,
        texts=deltas.texts,
        finish_reasons=deltas.finish_reasons,
        enqueued_unix_ns=enqueued_unix_ns,
        num_cached_tokens=deltas.num_cached_tokens,
    )
    if deltas.readings is not None:
        _add_readings(message, deltas.readings)
    return message


def _add_readings(message: OutputDeltas, readings: ReadArrays) -> None:
    if any(readings.num_reasoning_tokens):
        message.reasonings.extend(readings.reasonings)
        message.num_reasoning_tokens.extend(readings.num_reasoning_tokens)
    if any(readings.is_budget_spent):
        message.is_budget_spent.extend(readings.is_budget_spent)
    if readings.calls:
        message.tool_calls.CopyFrom(
            ToolCallDeltas(
                num_deltas=readings.num_call_parts,
                indexes=[part.index for part in readings.calls],
                names=[part.name for part in readings.calls],
                arguments=[part.arguments for part in readings.calls],
                ids=[part.call_id for part in readings.calls],
            )
        )
