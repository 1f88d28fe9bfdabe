"""Generations for gateways: tokens in, tokens out, known by the gateway's request ids, to be aborted. Part of the shell."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.errors import InvalidRequestError, RequestAbortedError
from services.router.generation import (
    Call,
    Engine,
    GenerationRequest,
    ModelDescription,
    OutputPiece,
    OutputStream,
    TokenLogprob,
)
from services.router.limits import shown

REQUEST_ID_CHARS_MAX = 256


@dataclass(slots=True)
class Choice:
    """What a choice of a request has given so far.

    Attributes:
        index: Which choice.
        token_ids: All its tokens, but for one that ended it.
        logprobs: Of these, where they were asked for.
        prompt_logprobs: Of the prompt, where they were asked for.
        num_tokens: Tokens computed, with one that ended it.
        finish_reason: "stop", "length" or "abort" once it is over.
        stop_token_id: The token that ended it.
        stop_string: The string that ended it, where only one was asked for.
    """

    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    num_tokens: int = 0
    finish_reason: str | None = None
    stop_token_id: int | None = None
    stop_string: str | None = None


class Step(NamedTuple):
    """What is new of a choice: its tokens without one that ended it, and what was asked of them."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class _Open:
    stream: OutputStream
    is_aborted: bool = False


class Generations:
    """The open generations of one gateway port."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._open: dict[str, _Open] = {}
        self._num_tokens = 0
        self._counted_ns = time.monotonic_ns()

    @property
    def num_open(self) -> int:
        """Generations under way."""
        return len(self._open)

    def tokens_per_s(self) -> float:
        """Output tokens a second since this was asked last."""
        now_ns = time.monotonic_ns()
        rate = self._num_tokens / max((now_ns - self._counted_ns) / 1e9, 1e-3)
        self._num_tokens, self._counted_ns = 0, now_ns
        return rate

    async def run(
        self, request_id: str, request: GenerationRequest, description: ModelDescription, call: Call
    ) -> AsyncIterator[tuple[Choice, Step, OutputStream]]:
        """Generate.

        Yields:
            The choice that got on, what is new of it, and the stream with the counts of the request. With a choice's last one its
            finish reason is set.

        Raises:
            InvalidRequestError: The id is missing, too long, or that of a generation under way.
            HeadraceError: The request ended without its full output.
        """
        self._check_id(request_id)
        stream = self._engine.open_stream(request, call)
        opened = self._open[request_id] = _Open(stream)
        choices = [Choice(index) for index in range(request.num_choices)]
        ends = {*description.eos_token_ids, *request.stopping.stop_token_ids}
        try:
            while any(choice.finish_reason is None for choice in choices):
                try:
                    piece = await stream.next()
                except RequestAbortedError:
                    if not opened.is_aborted:
                        raise
                    for choice in choices:
                        if choice.finish_reason is None:
                            choice.finish_reason = "abort"
                            yield choice, Step(), stream
                    return
                choice = choices[piece.choice]
                yield choice, self._take(choice, piece, request, ends), stream
        finally:
            del self._open[request_id]
            stream.close()

    def abort(self, request_id: str) -> bool:
        """End a generation; False when there is none of that id: it may be over already."""
        opened = self._open.get(request_id)
        if opened is None:
            return False
        opened.is_aborted = True
        opened.stream.close()
        return True

    def _check_id(self, request_id: str) -> None:
        if not 0 < len(request_id) <= REQUEST_ID_CHARS_MAX:
            raise InvalidRequestError(
                f"request_id must be a string of 1 to {REQUEST_ID_CHARS_MAX} characters; got {shown(request_id)}",
                param="request_id",
            )
        if request_id in self._open:
            raise InvalidRequestError(f"request_id {shown(request_id)} is that of a request under way", param="request_id")

    def _take(self, choice: Choice, piece: OutputPiece, request: GenerationRequest, ends: set[int]) -> Step:
        """Count a piece in; gives what is new without the token that ended the choice, which gateways do not want in the text."""
        token_ids, logprobs = piece.token_ids, piece.logprobs
        choice.num_tokens += len(token_ids)
        self._num_tokens += len(token_ids)
        choice.finish_reason = piece.finish_reason
        if piece.finish_reason == "stop":
            if token_ids and token_ids[-1] in ends:
                choice.stop_token_id = token_ids[-1]
                token_ids, logprobs = token_ids[:-1], logprobs[: len(token_ids) - 1]
            elif len(request.stopping.stop) == 1:
                choice.stop_string = request.stopping.stop[0]
        choice.token_ids += token_ids
        choice.logprobs += logprobs
        choice.prompt_logprobs = piece.prompt_logprobs or choice.prompt_logprobs
        return Step(token_ids, logprobs, piece.prompt_logprobs)
