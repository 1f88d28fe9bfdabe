"""Which stop string ended an output, for protocols that tell it. Pure.

The detokenizer says only that one did. So the stop string is asked for in the text, where it stands whole at the end of the last
piece, and is taken off here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from services.router.generation import OutputPiece


def take_stop(piece: OutputPiece, stops: Sequence[str]) -> tuple[OutputPiece, str | None]:
    """The last piece of an output without the stop string that ended it, and that string; None where the model itself ended it.

    An output with tool calls says that it has some, whatever ended it.
    """
    if piece.finish_reason not in ("stop", "tool_calls"):
        return piece, None
    # Of several that end at the same point the longest counts, as for the detokenizer.
    for stop in sorted(stops, key=len, reverse=True):
        if piece.text.endswith(stop):
            return replace(piece, text=piece.text[: -len(stop)]), stop
        if not piece.text and piece.reasoning.endswith(stop):
            return replace(piece, reasoning=piece.reasoning[: -len(stop)]), stop
    return piece, None
