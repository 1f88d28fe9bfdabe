"""Logprobs on their way through: told by a scheduler with tokens, sent on with the same tokens and the bytes of all named.

Streams whose requests asked have them; the others have nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from headrace.errors import ProtocolError
from headrace.v1.common_pb2 import TokenLogprobs
from headrace.v1.detokenizer_pb2 import TokenBatch
from headrace.v1.router_pb2 import OutputDeltas


@dataclass(slots=True)
class TokenLogs:
    """Logprobs of tokens that follow one another, each with `num_top` likely tokens beside it; flat."""

    num_top: int
    logprobs: list[float] = field(default_factory=list)
    top_token_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        """Tokens told of."""
        return len(self.logprobs)

    def extend(self, other: TokenLogs, start: int, end: int) -> None:
        """Append those of some of another's tokens, from one to before another."""
        likely = slice(start * other.num_top, end * other.num_top)
        self.logprobs += other.logprobs[start:end]
        self.top_token_ids += other.top_token_ids[likely]
        self.top_logprobs += other.top_logprobs[likely]

    def cut(self, num_tokens: int) -> None:
        """Forget all but the first tokens."""
        del self.logprobs[num_tokens:]
        del self.top_token_ids[num_tokens * self.num_top :]
        del self.top_logprobs[num_tokens * self.num_top :]


@dataclass(slots=True)
class Told:
    """What a batch tells of one stream, or what of it is unsent: logprobs of tokens, and those of the whole prompt."""

    outputs: TokenLogs | None = None
    prompt: TokenLogs | None = None
    prompt_token_ids: Sequence[int] = ()

    @property
    def num_numbers(self) -> int:
        """How much there is to keep."""
        return sum(len(logs) * (1 + logs.num_top) for logs in (self.outputs, self.prompt) if logs is not None)

    def take(self, other: Told, start: int, end: int) -> None:
        """Add what is told of some tokens, and of the prompt where it comes with the first of them."""
        if other.outputs is not None:
            if self.outputs is None:
                self.outputs = TokenLogs(other.outputs.num_top)
            self.outputs.extend(other.outputs, start, end)
        if other.prompt is not None and start == 0:
            self.prompt, self.prompt_token_ids = other.prompt, other.prompt_token_ids

    def cut(self, num_tokens: int) -> None:
        """Forget all but the first tokens; they come again, and the prompt with the first."""
        if self.outputs is not None:
            self.outputs.cut(num_tokens)
        if not num_tokens:
            self.prompt, self.prompt_token_ids = None, ()


def told_by_stream(body: TokenBatch) -> dict[int, Told]:
    """What a token batch tells, by stream number; empty for most.

    Raises:
        ProtocolError: An array has a wrong length.
    """
    if not body.HasField("logprobs") and not body.HasField("prompt_logprobs"):
        return {}
    counts = body.num_tokens or [1] * len(body.stream_ids)
    told: dict[int, Told] = {}
    for place, logs in _rows(body.logprobs, len(body.stream_ids)):
        if len(logs) != counts[place]:
            raise ProtocolError(f"token batch: {len(logs)} logprobs for {counts[place]} tokens")
        told.setdefault(body.stream_ids[place], Told()).outputs = logs
    start = 0
    for place, logs in _rows(body.prompt_logprobs, len(body.stream_ids)):
        stream = told.setdefault(body.stream_ids[place], Told())
        stream.prompt, stream.prompt_token_ids = logs, list(body.prompt_token_ids[start : start + len(logs)])
        start += len(logs)
    if start != len(body.prompt_token_ids):
        raise ProtocolError(f"token batch: {len(body.prompt_token_ids)} prompt_token_ids for {start} logprobs")
    return told


def _rows(arrays: TokenLogprobs, num_streams: int) -> Iterator[tuple[int, TokenLogs]]:
    logprobs, top_token_ids, top_logprobs = list(arrays.logprobs), list(arrays.top_token_ids), list(arrays.top_logprobs)
    num_likely = sum(count * most for count, most in zip(arrays.num_tokens, arrays.num_top, strict=False))
    if (
        not len(arrays.rows) == len(arrays.num_tokens) == len(arrays.num_top)
        or max(arrays.rows, default=-1) >= num_streams
        or sum(arrays.num_tokens) != len(logprobs)
        or not num_likely == len(top_token_ids) == len(top_logprobs)
    ):
        raise ProtocolError(f"token batch: logprobs of {len(arrays.rows)} streams in arrays of other lengths")
    start = start_top = 0
    for place, count, most in zip(arrays.rows, arrays.num_tokens, arrays.num_top, strict=True):
        end, end_top = start + count, start_top + count * most
        yield place, TokenLogs(most, logprobs[start:end], top_token_ids[start_top:end_top], top_logprobs[start_top:end_top])
        start, start_top = end, end_top


def fill(body: OutputDeltas, told: Mapping[int, Told], pieces: Sequence[bytes]) -> None:
    """Add what is unsent to the message that carries the tokens.

    Args:
        body: With the tokens of all its streams.
        told: Unsent logprobs, by the stream's place in the message.
        pieces: Bytes of each token id, special tokens included.
    """
    counts = body.num_tokens or [1] * len(body.stream_ids)
    start = 0
    for place, count in enumerate(counts):
        token_ids = body.token_ids[start : start + count]
        start += count
        stream = told.get(place)
        if stream is None:
            continue
        if stream.outputs is not None and count:
            _add(body.logprobs, place, stream.outputs)
            body.logprob_texts.extend(_texts(token_ids, stream.outputs, pieces))
        if stream.prompt is not None:
            _add(body.prompt_logprobs, place, stream.prompt)
            body.prompt_token_ids.extend(stream.prompt_token_ids)
            body.prompt_texts.extend(_texts(stream.prompt_token_ids, stream.prompt, pieces))


def _add(arrays: TokenLogprobs, place: int, logs: TokenLogs) -> None:
    arrays.rows.append(place)
    arrays.num_tokens.append(len(logs))
    arrays.num_top.append(logs.num_top)
    arrays.logprobs.extend(logs.logprobs)
    arrays.top_token_ids.extend(logs.top_token_ids)
    arrays.top_logprobs.extend(logs.top_logprobs)


def _texts(token_ids: Sequence[int], logs: TokenLogs, pieces: Sequence[bytes]) -> Iterator[bytes]:
    """Bytes of each token, then of those beside it; an id that names no token has none."""
    for index, token_id in enumerate(token_ids):
        for named in (token_id, *logs.top_token_ids[index * logs.num_top : (index + 1) * logs.num_top]):
            yield pieces[named] if named < len(pieces) else b""
