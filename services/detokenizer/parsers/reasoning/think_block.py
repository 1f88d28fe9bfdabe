"""Reasoning in a block at the beginning of the output: `<think>…</think>` and its like.

Only the first block counts, and only where the output begins with it: later on, the same markers are words about reasoning. White
space round the block is left out. A block that never ends is all reasoning.
"""

from __future__ import annotations

from typing import Final

from headrace.output_formats import ReasoningFormat
from services.detokenizer.parsers.characters import SPACES, Emit, Source, Steps, copy_rest, copy_until, match, skip_spaces

_SPACES_HELD_MAX: Final = 1024


class ThinkBlock:
    """Reads a block, then hands everything on."""

    def __init__(self, form: ReasoningFormat, *, starts_inside: bool, keeps_markers: bool) -> None:
        """Prepare to read.

        Args:
            form: The markers.
            starts_inside: The prompt has opened the block.
            keeps_markers: The reasoning is to stay in the text, as it was written.
        """
        self.is_inside = starts_inside
        self.is_over = False
        """Whether the block has ended or there was none: only text follows."""
        self._form = form
        self._keeps_markers = keeps_markers

    def read(self, source: Source, emit_reasoning: Emit, emit_text: Emit) -> Steps[None]:
        """Read the whole output. With `keeps_markers` nothing goes to `emit_reasoning`."""
        form = self._form
        spaces = yield from skip_spaces(source)
        has_opening = yield from match(source, form.opening)
        if self._keeps_markers:
            emit_text(spaces + (form.opening if has_opening else ""))
        elif not has_opening and not self.is_inside:
            emit_text(spaces)
        self.is_inside = self.is_inside or has_opening
        if self.is_inside:
            if self._keeps_markers:
                closing = yield from copy_until(source, emit_text, (form.closing,))
                emit_text(closing)
            else:
                yield from skip_spaces(source)
                closing = yield from copy_until(source, _Trimmed(emit_reasoning), (form.closing,))
            self.is_inside = not closing
            if closing and not self._keeps_markers:
                yield from skip_spaces(source)
        self.is_over = True
        yield from copy_rest(source, emit_text)


class _Trimmed:
    """Emits text, holding white space back until something follows it; a very long run of it is let go."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._spaces = ""

    def __call__(self, text: str) -> None:
        words = text.rstrip(SPACES)
        if words:
            self._emit(self._spaces + words)
            self._spaces = text[len(words) :]
        else:
            self._spaces += text
        num_over = len(self._spaces) - _SPACES_HELD_MAX
        if num_over > 0:
            self._emit(self._spaces[:num_over])
            self._spaces = self._spaces[num_over:]
