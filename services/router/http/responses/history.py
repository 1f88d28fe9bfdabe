"""What is remembered of responses and conversations. Pure, and told the time; how it is kept stands in entries.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.errors import InvalidRequestError, NotFoundError, UnavailableError
from services.router.http.responses.claims import Claims
from services.router.http.responses.entries import Entries, HistoryLimits
from services.router.http.responses.items import Item

CHAIN_MAX = 1024
"""Most responses that one may follow on; more would make every next one slower."""
UNFINISHED = ("queued", "in_progress")
LOST = "the router that made this response has ended, or could not keep its end; send the request again"


class Responses:
    """Responses of one key, with what they were given."""

    def __init__(self, entries: Entries, claims: Claims, key_name: str) -> None:
        self._entries = entries
        self._claims = claims
        self._key_name = key_name

    def begin(self, response: dict[str, Any], input_items: Sequence[Item], now_s: float) -> None:
        """Keep a response that this router is going to make, until `History.release`."""
        self._claims.take(response["id"])
        try:
            self.put(response, input_items, now_s)
        except BaseException:
            self._claims.release(response["id"])
            raise

    def put(self, response: dict[str, Any], input_items: Sequence[Item], now_s: float) -> None:
        """Keep a response as it stands, in place of how it stood before."""
        conversation = response["conversation"]
        self._entries.put(
            response,
            "response",
            input_items,
            key_name=self._key_name,
            status=response["status"],
            previous_id=response["previous_response_id"],
            conversation_id=None if conversation is None else conversation["id"],
            now_s=now_s,
        )

    def get(self, response_id: str, now_s: float) -> dict[str, Any]:
        """A response. One that is not finished, and that nobody makes any more, has failed.

        Raises:
            NotFoundError: There is none of that id, or it has expired.
        """
        response = self._entries.body(response_id, "response", now_s, key_name=self._key_name)
        if response["status"] not in UNFINISHED or self._claims.is_taken(response_id):
            return response
        # Its maker keeps its end before it lets go: read after that, what is unfinished stays so.
        response = self._entries.body(response_id, "response", now_s, key_name=self._key_name)
        if response["status"] in UNFINISHED:
            response |= {"status": "failed", "error": {"code": "server_error", "message": LOST}}
            self._entries.replace(response, "failed")
        return response

    def finished(self, response_id: str, now_s: float) -> dict[str, Any]:
        """A response that this router does not make.

        Raises:
            NotFoundError: There is none of that id, or it has expired.
            UnavailableError: Another router makes it.
        """
        response = self.get(response_id, now_s)
        if response["status"] in UNFINISHED:
            message = (
                f"the response {response_id} is being made by another router, which alone can end it or send its events: retry"
            )
            raise UnavailableError(message, param="response_id")
        return response

    def input_items(self, response_id: str, now_s: float) -> list[Item]:
        """What a response was given, oldest first."""
        self.get(response_id, now_s)
        return self._entries.items(response_id)

    def transcript(self, response_id: str, now_s: float) -> list[Item]:
        """All items up to and including a response's output, through the responses that it followed on.

        Raises:
            InvalidRequestError: It, or one before it, is not there or not finished.
        """
        parts: list[list[Item]] = []
        following: str | None = response_id
        while following is not None:
            if len(parts) >= CHAIN_MAX:
                message = f"previous_response_id must follow on at most {CHAIN_MAX} responses; begin a new conversation"
                raise InvalidRequestError(message, param="previous_response_id")
            try:
                body = self.get(following, now_s)
            except NotFoundError as error:
                raise InvalidRequestError(
                    f"{error.message}; previous_response_id leads there", param="previous_response_id"
                ) from error
            if body["status"] in UNFINISHED:
                message = f"previous_response_id must name a finished response; {following} is {body['status']}"
                raise InvalidRequestError(message, param="previous_response_id")
            before = body["conversation"]
            parts.append(self._entries.items(following) + body["output"])
            following = body["previous_response_id"] if before is None else None
        return [item for part in reversed(parts) for item in part]

    def delete(self, response_id: str, now_s: float) -> None:
        """Forget a response that this router does not make; raises as `finished` does."""
        self.finished(response_id, now_s)
        self._entries.delete(response_id)


class Conversations:
    """Conversations of one key, with what was said in them."""

    def __init__(self, entries: Entries, key_name: str) -> None:
        self._entries = entries
        self._key_name = key_name

    def put(self, conversation: dict[str, Any], items: Sequence[Item], now_s: float) -> None:
        """Keep a new conversation."""
        self._entries.put(conversation, "conversation", items, key_name=self._key_name, status="completed", now_s=now_s)

    def get(self, conversation_id: str, now_s: float) -> dict[str, Any]:
        """A conversation without its items."""
        return self._entries.body(conversation_id, "conversation", now_s, key_name=self._key_name)

    def update(self, conversation_id: str, metadata: dict[str, str], now_s: float) -> dict[str, Any]:
        """Give a conversation other metadata."""
        body = {**self.get(conversation_id, now_s), "metadata": metadata}
        self._entries.replace(body, "completed")
        return body

    def items(self, conversation_id: str, now_s: float) -> list[Item]:
        """A conversation's items, oldest first."""
        self.get(conversation_id, now_s)
        return self._entries.items(conversation_id)

    def append(self, conversation_id: str, items: Sequence[Item], now_s: float) -> None:
        """Add items to a conversation, which lives on for as long as a new one would."""
        self.get(conversation_id, now_s)
        self._entries.append_items(conversation_id, items, now_s)

    def delete(self, conversation_id: str, now_s: float) -> None:
        """Forget a conversation, with its items."""
        self.get(conversation_id, now_s)
        self._entries.delete(conversation_id)

    def delete_item(self, conversation_id: str, item_id: str, now_s: float) -> None:
        """Take an item out of a conversation."""
        self.get(conversation_id, now_s)
        if not self._entries.delete_item(conversation_id, item_id):
            raise NotFoundError(f"there is no item {item_id[:100]!r} in this conversation", param="item_id")


class KeyHistory:
    """What is remembered of one key; what others have stored is as if it were not there."""

    def __init__(self, entries: Entries, claims: Claims, key_name: str) -> None:
        self._entries = entries
        self._key_name = key_name
        self.responses = Responses(entries, claims, key_name)
        self.conversations = Conversations(entries, key_name)

    def resolve(self, items: Sequence[Item], now_s: float) -> list[Item]:
        """Items with references replaced by what they name.

        Raises:
            InvalidRequestError: A reference names nothing that is kept.
        """
        return [
            self._entries.item(item["id"], now_s, key_name=self._key_name) if item["type"] == "item_reference" else item
            for item in items
        ]


class History:
    """Everybody's, in one file or in memory."""

    def __init__(self, path: str, limits: HistoryLimits) -> None:
        """`path` is a file's, or ":memory:"."""
        self._entries = Entries(path, limits)
        self._claims = Claims(None if path == ":memory:" else Path(path).with_suffix(".running"))

    def of(self, key_name: str) -> KeyHistory:
        """That of a key; "" where none are asked for."""
        return KeyHistory(self._entries, self._claims, key_name)

    def release(self, response_id: str) -> None:
        """A response that was begun is over. Blocks no longer than a file takes to close, and may be called from any thread."""
        self._claims.release(response_id)

    def sweep(self, now_s: float) -> None:
        """Drop what former lives of routers left."""
        self._claims.sweep(now_s)

    def close(self) -> None:
        """Close the files."""
        self._claims.close()
        self._entries.close()
