"""GPT-OSS's channels: reasoning in "analysis", calls in messages to `functions.…`, the answer in "final".

A reader of our own: openai-harmony's works on token ids of one vocabulary, which it downloads, and not on text.

    <|channel|>analysis<|message|>…<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>

Text outside any message, and a message to someone unknown, is text.
"""

from __future__ import annotations

from typing import Final

from services.detokenizer.parsers.characters import Emit, Source, Steps, copy_until, match, skip_spaces
from services.detokenizer.parsers.reading import Reading, ToolTypes

_START: Final = "<|start|>"
_CHANNEL: Final = "<|channel|>"
_MESSAGE: Final = "<|message|>"
_CONSTRAIN: Final = "<|constrain|>"
_ENDS: Final = ("<|end|>", "<|call|>", "<|return|>")
MARKERS: Final = (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS)
_BODY_ENDS: Final = (_START, _CHANNEL, *_ENDS)
_RECIPIENT: Final = "to="
_FUNCTIONS: Final = "functions."


class Harmony:
    """Reads messages. Reasoning and calls are told apart here already; without tools, calls are text."""

    def __init__(self, *, keeps_reasoning: bool) -> None:
        self.is_reasoning = False
        self._keeps_reasoning = keeps_reasoning

    def read(self, source: Source, reading: Reading, tools: ToolTypes | None) -> Steps[None]:
        """Read the whole output."""
        lead = yield from skip_spaces(source)
        marker, header = "", ""
        if (yield from match(source, _RECIPIENT)):
            # The prompt has opened the message; its header goes on.
            marker, header = yield from self._read_header(source, _RECIPIENT)
            if not marker:
                reading.text(lead + header)
                return
        else:
            reading.text(lead)
        while marker or (marker := (yield from copy_until(source, reading.text, MARKERS))):
            if marker in (_START, _CHANNEL, _CONSTRAIN):
                marker, more = yield from self._read_header(source, marker)
                header += more
            if marker == _MESSAGE:
                marker = yield from self._read_body(source, reading, tools, header)
                marker = "" if marker in _ENDS else marker
            else:
                # A header without a message: cut off, or broken.
                reading.text(header)
                marker = ""
            header = ""

    def _read_header(self, source: Source, begun: str) -> Steps[tuple[str, str]]:
        """The marker that ends a header, and the header with its inner markers."""
        header = [begun]
        while marker := (yield from copy_until(source, header.append, MARKERS)):
            if marker in (_MESSAGE, *_ENDS):
                return marker, "".join(header)
            header.append(marker)
        return "", "".join(header)

    def _read_body(self, source: Source, reading: Reading, tools: ToolTypes | None, header: str) -> Steps[str]:
        """A message's text, by what its header says; gives the marker behind it."""
        channel = _word_behind(header, _CHANNEL)
        recipient = _word_behind(header, _RECIPIENT)
        emit: Emit = reading.text
        name = recipient.removeprefix(_FUNCTIONS)
        if recipient.startswith(_FUNCTIONS) and tools is not None and tools.knows(name):
            reading.begin_call(name)
            yield from skip_spaces(source)
            emit = reading.arguments
        elif channel == "analysis":
            self.is_reasoning = True
            if not self._keeps_reasoning:
                emit = reading.reasoning
        elif recipient:
            reading.text(header + _MESSAGE)
        marker = yield from copy_until(source, emit, _BODY_ENDS)
        if marker:
            reading.end_call()
        # Cut off, the reasoning still stands open.
        self.is_reasoning = self.is_reasoning and not marker
        return marker


def _word_behind(header: str, mark: str) -> str:
    """The word behind the last `mark` in a header."""
    _, found, rest = header.rpartition(mark)
    word = rest.split(maxsplit=1)[0] if found and rest.split() else ""
    return word.partition("<|")[0]
