"""One stream: tokens in at positions, text out, and what has not reached the router yet.

A stream gathers tokens and text until they are sent. When its router's queue is full it remembers that point; when too much has
been gathered since, `rewind` returns to it, so that the router can ask for the same tokens again and lose nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from headrace.v1.common_pb2 import FinishReason
from services.detokenizer.incremental_decoder import DecoderState, IncrementalDecoder
from services.detokenizer.logprobs import Told
from services.detokenizer.stop_strings import StopMatcher
from services.detokenizer.stream_reader import StreamReader

NOT_FINISHED = FinishReason.FINISH_REASON_UNSPECIFIED


class Outcome(IntEnum):
    """What became of tokens given to a stream."""

    TAKEN = 0
    """Something new is to be sent."""
    NOTHING_NEW = 1
    """Positions seen before."""
    GAP = 2
    """Tokens are missing before these."""
    STOPPED = 3
    """A stop string, or the reasoning budget, ended the stream, of which the scheduler does not know yet."""


class Stream:
    """State of one stream. Positions count output tokens from 0; characters are Unicode code points."""

    __slots__ = (
        "_checkpoint",
        "_decoder",
        "_matcher",
        "_num_skipped_chars",
        "_reader",
        "finish_reason",
        "gap_told_ns",
        "is_budget_spent",
        "is_unsent",
        "next_position",
        "num_cached_tokens",
        "owner",
        "stream_id",
        "told",
        "unsent_position",
        "unsent_texts",
        "unsent_token_ids",
    )

    def __init__(
        self,
        stream_id: int,
        owner: int,
        decoder: IncrementalDecoder,
        matcher: StopMatcher | None,
        reader: StreamReader | None = None,
    ) -> None:
        self.stream_id = stream_id
        self.owner = owner
        """Process life of the router that opened the stream."""
        self.next_position = 0
        """Output position of the next token wanted."""
        self.num_cached_tokens = 0
        self.finish_reason: FinishReason = NOT_FINISHED
        self.gap_told_ns: int | None = None
        """When the router was last told of the gap that stands open; None when there is none."""
        self.is_unsent = False
        """Whether something waits to be sent."""
        self.unsent_position = 0
        """Output position of the first unsent token."""
        self.unsent_token_ids: list[int] = []
        self.unsent_texts: list[str] = []
        self.is_budget_spent = False
        """Whether it was stopped because of its reasoning budget."""
        self.told: Told | None = None
        """Logprobs of the unsent tokens; None where nobody asked."""
        self._decoder = decoder
        self._matcher = matcher
        self._reader = reader
        self._num_skipped_chars = 0
        self._checkpoint: _Checkpoint | None = None

    @property
    def reader(self) -> StreamReader | None:
        """What reads its text; None when it is only text."""
        return self._reader

    def resume(self, history: Sequence[int], *, num_output_tokens: int, num_sent_chars: int) -> bool:
        """Go on where another detokenizer left the stream.

        Args:
            history: The prompt's tail, then all output tokens so far. Every id is >= 0.
            num_output_tokens: Output tokens at the end of `history`; at most all of it.
            num_sent_chars: Characters of the output text the router has; they are not sent again.

        Returns:
            Whether there is something to send at once: text that was not sent, or a stop string.
        """
        num_prompt_tokens = len(history) - num_output_tokens
        # The text of the prompt is not ours to show, but a character may have begun in it.
        self._decoder.decode(history[:num_prompt_tokens])
        self._num_skipped_chars = num_sent_chars
        self.next_position = num_output_tokens
        text = self._read(history[num_prompt_tokens:])[1]
        self._gather((), text)
        has_read = self._reader is not None and self._reader.has_unsent
        self.is_unsent = bool(self.unsent_texts) or has_read or self.finish_reason != NOT_FINISHED
        return self.is_unsent

    def take(
        self,
        position: int,
        token_ids: Sequence[int],
        finish_reason: FinishReason,
        *,
        num_stop_tokens: int,
        told: Told | None = None,
    ) -> Outcome:
        """Take tokens of a step.

        Args:
            position: Output position of the first of `token_ids`.
            token_ids: May be none, when only the end is told.
            finish_reason: Why the stream ends after them; UNSPECIFIED when it goes on.
            num_stop_tokens: So many at the end are stop tokens and make no text.
            told: Logprobs that came with them.
        """
        num_seen = self.next_position - position
        if num_seen < 0:
            return Outcome.GAP
        is_finished = finish_reason != NOT_FINISHED
        if num_seen >= len(token_ids) and not is_finished:
            return Outcome.NOTHING_NEW
        self.gap_told_ns = None
        fresh = token_ids[num_seen:] if num_seen else token_ids
        readable = fresh[: max(0, len(fresh) - num_stop_tokens)] if num_stop_tokens else fresh
        num_read, text = self._read(readable)
        if self.finish_reason != NOT_FINISHED:
            # Tokens after the one that completed the stop string never were.
            self._gather(fresh[:num_read], text)
            self._tell(told, num_seen, num_read)
            return Outcome.TAKEN if is_finished else Outcome.STOPPED
        if is_finished:
            text += self._flush(finish_reason)
        self._gather(fresh, text)
        self._tell(told, num_seen, len(fresh))
        return Outcome.TAKEN

    def fail(self) -> None:
        """End the stream with an error, without more text."""
        self.finish_reason = FinishReason.FINISH_REASON_ERROR
        self._gather((), "")

    def mark_sent(self) -> None:
        """Forget what waited: the router's queue has it."""
        self.is_unsent = False
        self._checkpoint = None
        self.unsent_token_ids.clear()
        self.unsent_texts.clear()
        if self._reader is not None:
            self._reader.mark_sent()
        self.told = None

    def mark_unsent(self) -> int:
        """Note that the router's queue is full; give how many tokens were gathered since that was noted first."""
        if self._checkpoint is None:
            held = self._matcher.held if self._matcher is not None else ""
            self._checkpoint = _Checkpoint(
                self._decoder.state, held, self._num_skipped_chars, len(self.unsent_token_ids), len(self.unsent_texts)
            )
            if self._reader is not None:
                self._reader.mark()
        return len(self.unsent_token_ids) - self._checkpoint.num_token_ids

    def rewind(self) -> None:
        """Return an unfinished stream to where its router's queue was first full; the tokens since then are wanted again."""
        point = self._checkpoint
        if point is None:
            return
        self._decoder.restore(point.decoder_state)
        if self._matcher is not None:
            self._matcher.restore(point.held)
        if self._reader is not None:
            self._reader.rewind()
        self._num_skipped_chars = point.num_skipped_chars
        self.next_position = self.unsent_position + point.num_token_ids
        del self.unsent_token_ids[point.num_token_ids :]
        del self.unsent_texts[point.num_texts :]
        if self.told is not None:
            self.told.cut(point.num_token_ids)

    def _gather(self, token_ids: Sequence[int], text: str) -> None:
        if not self.is_unsent:
            self.is_unsent = True
            self.unsent_position = self.next_position
        self.next_position += len(token_ids)
        self.unsent_token_ids += token_ids
        if self._num_skipped_chars:
            num_skipped = min(len(text), self._num_skipped_chars)
            self._num_skipped_chars -= num_skipped
            text = text[num_skipped:]
        if text:
            self.unsent_texts.append(text)

    def _tell(self, told: Told | None, num_seen: int, num_tokens: int) -> None:
        if told is not None:
            if self.told is None:
                self.told = Told()
            self.told.take(told, num_seen, num_seen + num_tokens)

    def _read(self, token_ids: Sequence[int]) -> tuple[int, str]:
        """Decode up to the token that ends the stream; give how many tokens that were, and the text to show."""
        matcher, reader = self._matcher, self._reader
        if matcher is None and reader is None:
            return len(token_ids), self._decoder.decode(token_ids)
        shown = []
        for index, token_id in enumerate(token_ids):
            text = self._decoder.decode((token_id,))
            if matcher is not None:
                text = matcher.push(text)
            if reader is None:
                shown.append(text)
            else:
                reader.push(text)
            if matcher is not None and matcher.is_found:
                self.finish_reason = FinishReason.FINISH_REASON_STOP
                if reader is not None:
                    reader.finish("", is_cut=False)
            elif reader is not None and reader.is_budget_spent:
                self.finish_reason = FinishReason.FINISH_REASON_STOP
                self.is_budget_spent = True
            if self.finish_reason != NOT_FINISHED:
                return index + 1, reader.gather() if reader is not None else "".join(shown)
        return len(token_ids), reader.gather() if reader is not None else "".join(shown)

    def _flush(self, finish_reason: FinishReason) -> str:
        self.finish_reason = finish_reason
        text = self._decoder.flush()
        if self._matcher is not None:
            text = self._matcher.push(text)
            if self._matcher.is_found:
                self.finish_reason = FinishReason.FINISH_REASON_STOP
            else:
                text += self._matcher.flush()
        if self._reader is None:
            return text
        self._reader.finish(text, is_cut=self.finish_reason != FinishReason.FINISH_REASON_STOP)
        return self._reader.gather()


class _Checkpoint(NamedTuple):
    """A point of a stream to return to, and how much of the unsent part lies before it."""

    decoder_state: DecoderState
    held: str
    num_skipped_chars: int
    num_token_ids: int
    num_texts: int
