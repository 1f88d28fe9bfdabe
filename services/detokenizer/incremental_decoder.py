"""Tokens in, text out, a little at a time, and never half a character.

A decoder's state is at most three bytes (the beginning of a character whose end is still to come) and whether the text has begun.
So a broken byte is replaced as soon as it is known to be broken, nothing is decoded twice, and the state can be rebuilt by
feeding the history once. However the tokens are split over calls, the joined result is the same; it equals the tokenizer's own
`decode` of all of them.

Source: Unicode 16, section 3.9, "U+FFFD substitution of maximal subparts", which both Python and Rust follow.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence

from services.detokenizer.token_table import TokenTable

DecoderState = tuple[bytes, int, bool]
"""What `IncrementalDecoder.state` gives: bytes of an unfinished character, spaces still to strip, whether a token came."""


class IncrementalDecoder:
    """Decodes one stream."""

    __slots__ = ("_at_start", "_num_spaces", "_pieces", "_table", "_tail", "_texts")

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._pieces = table.pieces
        self._texts = table.texts
        self._tail = b""
        self._num_spaces = table.start_rule.num_stripped_spaces
        self._at_start = bool(table.first_pieces) or self._num_spaces > 0

    @property
    def state(self) -> DecoderState:
        """All that tells this decoder from a new one; give it back to `restore` to return to this point."""
        return self._tail, self._num_spaces, self._at_start

    def restore(self, state: DecoderState) -> None:
        """Return to an earlier point of the stream."""
        self._tail, self._num_spaces, self._at_start = state

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode the next tokens.

        Args:
            token_ids: Not negative; ids that name no token decode to nothing, as in the tokenizer itself.

        Returns:
            The text that is complete now. A character's first bytes wait for the rest; bytes that cannot become a character
            come out as U+FFFD.
        """
        if self._at_start:
            return self._decode_start(token_ids)
        if len(token_ids) == 1 and not self._tail:
            try:
                text = self._texts[token_ids[0]]
            except IndexError:
                return ""
            if text is not None:
                return text
        return self._to_text(self._join(token_ids))

    def flush(self) -> str:
        """End the stream: an unfinished character comes out as U+FFFD, as it does from the tokenizer."""
        tail, self._tail = self._tail, b""
        return tail.decode(errors="replace")

    def _join(self, token_ids: Sequence[int]) -> bytes:
        pieces = self._pieces
        try:
            return b"".join([pieces[token_id] for token_id in token_ids])
        except IndexError:
            return b"".join([pieces[token_id] for token_id in token_ids if token_id < len(pieces)])

    def _decode_start(self, token_ids: Sequence[int]) -> str:
        """Apply the rule for the beginning of a text until it is past."""
        for index, token_id in enumerate(token_ids):
            piece = self._join((token_id,))
            if not piece:
                continue
            if self._table.first_pieces:
                # This token is the first, even where the rule leaves nothing of it.
                piece = self._table.first_pieces.get(token_id, piece)
                self._at_start = False
            else:
                while self._num_spaces and piece.startswith(b" "):
                    self._num_spaces -= 1
                    piece = piece[1:]
                self._at_start = not piece and self._num_spaces > 0
            if not self._at_start:
                return self._to_text(piece + self._join(token_ids[index + 1 :]))
        return ""

    def _to_text(self, data: bytes) -> str:
        if self._tail:
            data = self._tail + data
        text, num_decoded = utf_8_decode(data, "replace", False)
        self._tail = data[num_decoded:]
        return text
