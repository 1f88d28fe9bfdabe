"""Opens the prompts of one completion request and reads their streams as one. Part of the shell."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from headrace.errors import RequestAbortedError
from services.router.generation import Engine, OutputPiece, OutputStream, Prompt, TextPrompt, TokenPrompt
from services.router.http import serving
from services.router.http.completion_streams import BestOf, Echo
from services.router.http.exchange import Exchange, unless_disconnected
from services.router.http.openai import ParsedRequest


async def open_prompts(exchange: Exchange, engine: Engine, parsed: ParsedRequest) -> OutputStream:
    """Open a stream for each prompt of a completion; gives them as one, or the one there is.

    Raises:
        HeadraceError: One cannot be opened; then none is.
    """
    prompts = (parsed.generation.prompt, *parsed.other_prompts)
    texts = [await _text(exchange, engine, parsed, prompt) for prompt in prompts] if parsed.echo else []
    exchange.open_call.is_streaming = parsed.is_streaming
    streams: list[OutputStream] = []
    try:
        for index, prompt in enumerate(prompts):
            call = exchange.open_call
            if index:
                # Requests below it have ids of their own.
                call = replace(call, request_id=f"{call.request_id}-p{index}")
            generation = replace(parsed.generation, prompt=prompt)
            stream: OutputStream = serving.open_stream_for(call, exchange, engine, generation, user=parsed.user)
            streams.append(stream)
            if parsed.num_best is not None:
                streams[-1] = BestOf(
                    stream,
                    num_choices=generation.num_choices,
                    num_best=parsed.num_best,
                    keeps_logprobs=parsed.keeps_logprobs,
                )
            if parsed.echo:
                streams[-1] = Echo(streams[-1], texts[index], drop_output=parsed.drop_output)
    except BaseException:
        for stream in streams:
            stream.close()
        raise
    return streams[0] if len(streams) == 1 else PromptBatch(streams, num_choices=parsed.num_choices // len(streams))


async def _text(exchange: Exchange, engine: Engine, parsed: ParsedRequest, prompt: Prompt) -> str:
    """A prompt's text: the client's own, or that of its tokens."""
    if isinstance(prompt, TextPrompt):
        return prompt.text
    assert isinstance(prompt, TokenPrompt)
    generation = parsed.generation
    text = engine.detokenize(
        generation.model, prompt.token_ids.tolist(), exchange.open_call, skip_special_tokens=generation.skip_special_tokens
    )
    return await unless_disconnected(exchange, text)


class PromptBatch:
    """Streams of several prompts as one `OutputStream`; choices are numbered prompt by prompt.

    Args:
        streams: One a prompt.
        num_choices: Choices of each.
    """

    def __init__(self, streams: Sequence[OutputStream], *, num_choices: int) -> None:
        self._streams = streams
        self._num_choices = num_choices
        # By prompt; one that has ended is in it until the reader has sent the last of it on.
        self._num_unfinished = dict.fromkeys(range(len(streams)), num_choices)
        # Those that have been waiting for longest come first.
        self._reads: dict[int, asyncio.Task[OutputPiece]] = {}

    @property
    def model(self) -> str:
        """The model that answers."""
        return self._streams[0].model

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(stream.num_prompt_tokens for stream in self._streams)

    @property
    def num_output_tokens(self) -> int:
        """Tokens made so far, over all prompts and choices."""
        return sum(stream.num_output_tokens for stream in self._streams)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens whose KV was reused."""
        return sum(stream.num_cached_tokens for stream in self._streams)

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens made so far that were reasoning."""
        return sum(stream.num_reasoning_tokens for stream in self._streams)

    async def next(self) -> OutputPiece:
        """Further output of one choice of one prompt, waiting for some.

        Raises:
            HeadraceError: One of them failed.
        """
        for index, num_unfinished in list(self._num_unfinished.items()):
            if not num_unfinished:
                # Nobody reads on here, and a stream that is left after its last piece counts as one that its client does not read.
                self._streams[index].close()
                del self._num_unfinished[index]
            elif index not in self._reads:
                self._reads[index] = asyncio.create_task(self._streams[index].next())
        if not self._reads:
            raise RequestAbortedError("the output was read to its end")
        await asyncio.wait(self._reads.values(), return_when=asyncio.FIRST_COMPLETED)
        done = [index for index, read in self._reads.items() if read.done()]
        if not done:
            raise RequestAbortedError("the client went away")
        index = done[0]
        piece = self._reads.pop(index).result()
        self._num_unfinished[index] -= piece.finish_reason is not None
        return replace(piece, choice=index * self._num_choices + piece.choice)

    def close(self) -> None:
        """The reader leaves; whatever is still running ends."""
        for stream in self._streams:
            stream.close()
        for read in self._reads.values():
            # A read that failed beside the one that was told of has been dealt with.
            if not read.cancel() and not read.cancelled():
                read.exception()
        self._reads.clear()
