"""Tokens a CPU second through the detokenizer's core: batches of many streams, one token each, as a scheduler's steps are.

    python -m bench.micro.detokenizer --model-directory DIR [--streams 64] [--steps 2000] [--stop] [--compare]

`--compare` also times decoding alone, without a table of streams: ours, the tokenizers library's DecodeStream, and a window of
two `decode` calls a token.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from services.detokenizer.incremental_decoder import IncrementalDecoder
from services.detokenizer.streams import Batch, StreamLimits, StreamStart, StreamTable
from services.detokenizer.token_table import TokenTable

_TEXT = "The quick brown fox jumps over the lazy dog. Größe, 日本語, 😀 and some more plain words to read. "
_OWNER, _SOURCE = 1, 2


def time_table(table: TokenTable, token_ids: list[int], *, num_streams: int, stops: tuple[str, ...]) -> float:
    """Give the seconds a whole table takes for all tokens of all streams, output arrays included."""
    streams = StreamTable(table, StreamLimits())
    for stream_id in range(num_streams):
        streams.open(StreamStart(stream_id, stops=stops), owner=_OWNER, now_ns=0)
    stream_ids = list(range(num_streams))
    begin = time.process_time()
    for position, token_id in enumerate(token_ids):
        batch = Batch(stream_ids, [position] * num_streams, [token_id] * num_streams)
        batch.check()
        streams.apply(batch, source=_SOURCE, now_ns=position)
        streams.outbox(_OWNER).deltas()
        streams.mark_sent(_OWNER)
    return time.process_time() - begin


def time_decoders(make: Callable[[], Callable[[int], object]], token_ids: list[int], *, num_streams: int) -> float:
    """Give the seconds that bare decoders take for all tokens of all streams."""
    decoders = [make() for _ in range(num_streams)]
    begin = time.process_time()
    for token_id in token_ids:
        for decode in decoders:
            decode(token_id)
    return time.process_time() - begin


def _decode_stream(tokenizer: Tokenizer) -> Callable[[int], object]:
    stream = DecodeStream(skip_special_tokens=True)
    return lambda token_id: stream.step(tokenizer, token_id)


def _window(tokenizer: Tokenizer) -> Callable[[int], object]:
    token_ids: list[int] = []
    num_read = 0

    def decode(token_id: int) -> str:
        nonlocal num_read, token_ids
        token_ids.append(token_id)
        before, now = tokenizer.decode(token_ids[:num_read]), tokenizer.decode(token_ids)
        if len(now) <= len(before) or now.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        token_ids = token_ids[num_read:]
        num_read = len(token_ids)
        return now[len(before) :]

    return decode


def _table_decoder(table: TokenTable) -> Callable[[int], object]:
    decoder = IncrementalDecoder(table)
    return lambda token_id: decoder.decode((token_id,))


def main() -> None:
    """Run and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-directory", type=Path, required=True)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--stop", action="store_true", help="give each stream two stop strings that never come")
    parser.add_argument("--compare", action="store_true")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.model_directory / "tokenizer.json"))
    began = time.process_time()
    table = TokenTable.from_tokenizer(tokenizer, model=arguments.model_directory.name).without_special()
    figures: dict[str, float] = {"table_build_s": round(time.process_time() - began, 3)}
    ids = tokenizer.encode(_TEXT).ids
    token_ids = (ids * (arguments.steps // len(ids) + 1))[: arguments.steps]
    num_tokens = len(token_ids) * arguments.streams

    def note(name: str, seconds: float) -> None:
        figures[f"{name}_us_per_token"] = round(seconds / num_tokens * 1e6, 3)

    stops = ("\nUser:", "###") if arguments.stop else ()
    seconds = time_table(table, token_ids, num_streams=arguments.streams, stops=stops)
    note("streams", seconds)
    figures["streams_tokens_per_s"] = round(num_tokens / seconds)
    if arguments.compare:
        note("decoder", time_decoders(lambda: _table_decoder(table), token_ids, num_streams=arguments.streams))
        note("decode_stream", time_decoders(lambda: _decode_stream(tokenizer), token_ids, num_streams=arguments.streams))
        note("window", time_decoders(lambda: _window(tokenizer), token_ids, num_streams=arguments.streams))
    print(json.dumps({"streams": arguments.streams, "steps": arguments.steps, "stop_strings": len(stops), **figures}))


if __name__ == "__main__":
    main()
