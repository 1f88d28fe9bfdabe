"""What the core asks the shell to do. Plain data; the shell carries actions out in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.errors import HeadraceError
from services.router.generation import OutputPiece

if TYPE_CHECKING:
    from services.router.open_request import OpenRequest


@dataclass(frozen=True, slots=True)
class SendTokenize:
    """Ask a tokenizer for the prompt's tokens, or for the text of tokens."""

    request: OpenRequest
    to: int


@dataclass(frozen=True, slots=True)
class SendOpenStream:
    """Open the request's stream at a detokenizer, with all tokens so far."""

    request: OpenRequest
    to: int


@dataclass(frozen=True, slots=True)
class SendSubmit:
    """Hand prompt and outputs so far to a scheduler."""

    request: OpenRequest
    to: int


@dataclass(frozen=True, slots=True)
class SendRedirect:
    """Have the scheduler send tokens to the request's present detokenizer, from a position on."""

    request: OpenRequest
    to: int
    from_position: int


@dataclass(frozen=True, slots=True)
class SendAbort:
    """Free the request at a scheduler."""

    request_id: str
    to: int


@dataclass(frozen=True, slots=True)
class SendCloseStream:
    """Forget the stream at a detokenizer."""

    stream_id: int
    to: int


@dataclass(frozen=True, slots=True)
class ShareTokens:
    """The prompt's tokens are known: the other choices of the request can begin with them."""

    request: OpenRequest


@dataclass(frozen=True, slots=True)
class Deliver:
    """Give the client new output."""

    request: OpenRequest
    piece: OutputPiece


@dataclass(frozen=True, slots=True)
class End:
    """The request is over: with everything it asked for, or with an error. Comes exactly once a request, and last."""

    request: OpenRequest
    error: HeadraceError | None


SendWork = SendTokenize | SendOpenStream | SendSubmit | SendRedirect
Action = SendWork | SendAbort | SendCloseStream | ShareTokens | Deliver | End
