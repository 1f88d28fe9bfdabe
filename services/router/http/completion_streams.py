"""What completions do to the output of one prompt before it is sent: the best of several, the prompt before the output. Pure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from headrace.errors import RequestAbortedError
from services.router.generation import OutputPiece, OutputStream, TokenLogprob
from services.router.output_buffer import OutputBuffer


class ReadStream:
    """An `OutputStream` over another, whose output it changes."""

    def __init__(self, stream: OutputStream) -> None:
        self.stream = stream

    @property
    def model(self) -> str:
        """The model that answers."""
        return self.stream.model

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.stream.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens made so far, over all choices."""
        return self.stream.num_output_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens whose KV was reused."""
        return self.stream.num_cached_tokens

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens made so far that were reasoning."""
        return self.stream.num_reasoning_tokens

    async def next(self) -> OutputPiece:
        """Further output."""
        return await self.stream.next()

    def close(self) -> None:
        """The reader leaves."""
        self.stream.close()


class BestOf(ReadStream):
    """Of all choices those with the highest logprob a token, best first, when all are whole.

    Args:
        stream: The choices, with the logprobs of their tokens.
        num_choices: How many there are.
        num_best: How many are wanted.
        keeps_logprobs: The client asked for logprobs itself.
    """

    def __init__(self, stream: OutputStream, *, num_choices: int, num_best: int, keeps_logprobs: bool) -> None:
        super().__init__(stream)
        self._num_choices = num_choices
        self._num_best = num_best
        self._keeps_logprobs = keeps_logprobs
        self._best: list[OutputPiece] | None = None

    async def next(self) -> OutputPiece:
        """The next best choice, whole."""
        if self._best is None:
            found = sorted(await collect(self.stream, self._num_choices), key=lambda piece: _mean(piece.logprobs), reverse=True)
            self._best = [self._choice(index, piece) for index, piece in enumerate(found[: self._num_best])]
        if not self._best:
            raise RequestAbortedError("the output was read to its end")
        return self._best.pop(0)

    def _choice(self, index: int, piece: OutputPiece) -> OutputPiece:
        return replace(piece, choice=index, logprobs=piece.logprobs if self._keeps_logprobs else ())


class Echo(ReadStream):
    """The prompt before the output of each choice, or the prompt alone.

    Args:
        stream: The output.
        text: The prompt's.
        drop_output: Leave the output out; every choice ends with its prompt, by length.
    """

    def __init__(self, stream: OutputStream, text: str, *, drop_output: bool) -> None:
        super().__init__(stream)
        self._text = text
        self._drop_output = drop_output
        self._begun: set[int] = set()

    @property
    def num_output_tokens(self) -> int:
        """Tokens that are given."""
        return 0 if self._drop_output else self.stream.num_output_tokens

    async def next(self) -> OutputPiece:
        """Further output; the first of a choice begins with the prompt."""
        piece = await self.stream.next()
        if self._drop_output:
            piece = replace(
                piece, text="", token_ids=(), logprobs=(), finish_reason=None if piece.finish_reason is None else "length"
            )
        if piece.choice in self._begun:
            return piece
        self._begun.add(piece.choice)
        # What is told of tokens is told of the prompt's too.
        return replace(piece, text=self._text + piece.text, logprobs=piece.prompt_logprobs + piece.logprobs)


async def collect(stream: OutputStream, num_choices: int) -> list[OutputPiece]:
    """All output of a stream, one piece a choice, in order."""
    buffer = OutputBuffer(sys.maxsize)
    num_unfinished = num_choices
    while num_unfinished:
        piece = await stream.next()
        buffer.put(piece, piece.choice)
        num_unfinished -= piece.finish_reason is not None
    return sorted((buffer.take(0) for _ in range(num_choices)), key=lambda piece: piece.choice)


def _mean(tokens: Sequence[TokenLogprob]) -> float:
    known = [token.logprob for token in tokens if token.logprob is not None]
    return sum(known) / len(known) if known else -sys.float_info.max
