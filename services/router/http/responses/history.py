"""What is remembered of responses and conversations, in SQLite: in memory or in a file. Pure, and told the time.

Everything has a size and a time at which it goes. When a new entry does not fit any more, the oldest go first. All calls are
blocking, and come from one thread.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from headrace.errors import InvalidRequestError, NotFoundError, RequestTooLargeError
from services.router.http.responses.items import Item

CHAIN_MAX = 1024
"""Most responses that one may follow on; more would make every next one slower."""
UNFINISHED = ("queued", "in_progress")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, status TEXT NOT NULL, previous_id TEXT, conversation_id TEXT,
    created_s REAL NOT NULL, expires_s REAL NOT NULL, num_bytes INTEGER NOT NULL, body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS entries_by_expiry ON entries (expires_s, id, num_bytes);
CREATE TABLE IF NOT EXISTS items (
    owner TEXT NOT NULL REFERENCES entries (id) ON DELETE CASCADE, position INTEGER NOT NULL, id TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (owner, position)
);
CREATE INDEX IF NOT EXISTS items_by_id ON items (id);
"""


@dataclass(frozen=True, slots=True)
class HistoryLimits:
    """Bounds of what is remembered."""

    max_entries: int
    max_bytes: int
    ttl_s: float


class History:
    """Responses, conversations and their items."""

    def __init__(self, path: str, limits: HistoryLimits) -> None:
        """`path` is a file's, or ":memory:"."""
        self._limits = limits
        # Opened on whatever thread makes the store, used on the one thread that runs it.
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # Responses.

    def put_response(self, response: dict[str, Any], input_items: Sequence[Item], now_s: float) -> None:
        """Keep a response as it stands, in place of how it stood before."""
        conversation = response["conversation"]
        self._put(
            response,
            "response",
            input_items,
            status=response["status"],
            previous_id=response["previous_response_id"],
            conversation_id=None if conversation is None else conversation["id"],
            now_s=now_s,
        )

    def response(self, response_id: str, now_s: float) -> dict[str, Any]:
        """A response.

        Raises:
            NotFoundError: There is none of that id, or it has expired.
        """
        return self._body(response_id, "response", now_s)

    def input_items(self, response_id: str, now_s: float) -> list[Item]:
        """What a response was given, oldest first."""
        self._body(response_id, "response", now_s)
        return self._items(response_id)

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
                body = self._body(following, "response", now_s)
            except NotFoundError as error:
                raise InvalidRequestError(
                    f"{error.message}; previous_response_id leads there", param="previous_response_id"
                ) from error
            if body["status"] in UNFINISHED:
                message = f"previous_response_id must name a finished response; {following} is {body['status']}"
                raise InvalidRequestError(message, param="previous_response_id")
            before = body["conversation"]
            parts.append(self._items(following) + body["output"])
            following = body["previous_response_id"] if before is None else None
        return [item for part in reversed(parts) for item in part]

    def fail_unfinished(self, message: str, now_s: float) -> int:
        """Responses that a former life of the router left unfinished have failed; gives their number."""
        rows = self._db.execute(
            "SELECT id, body FROM entries WHERE kind = 'response' AND status IN ('queued', 'in_progress')"
        ).fetchall()
        for entry_id, body in rows:
            failed = {**orjson.loads(body), "status": "failed", "error": {"code": "server_error", "message": message}}
            self._db.execute("UPDATE entries SET status = 'failed', body = ? WHERE id = ?", (orjson.dumps(failed), entry_id))
        return len(rows)

    # Conversations.

    def put_conversation(self, conversation: dict[str, Any], items: Sequence[Item], now_s: float) -> None:
        """Keep a new conversation."""
        self._put(conversation, "conversation", items, status="completed", now_s=now_s)

    def conversation(self, conversation_id: str, now_s: float) -> dict[str, Any]:
        """A conversation without its items."""
        return self._body(conversation_id, "conversation", now_s)

    def update_conversation(self, conversation_id: str, metadata: dict[str, str], now_s: float) -> dict[str, Any]:
        """Give a conversation other metadata."""
        body = {**self.conversation(conversation_id, now_s), "metadata": metadata}
        self._db.execute("UPDATE entries SET body = ? WHERE id = ?", (orjson.dumps(body), conversation_id))
        return body

    def conversation_items(self, conversation_id: str, now_s: float) -> list[Item]:
        """A conversation's items, oldest first."""
        self.conversation(conversation_id, now_s)
        return self._items(conversation_id)

    def append_items(self, conversation_id: str, items: Sequence[Item], now_s: float) -> None:
        """Add items to a conversation, which lives on for another `ttl_s`."""
        self.conversation(conversation_id, now_s)
        (last,) = self._db.execute("SELECT coalesce(max(position), -1) FROM items WHERE owner = ?", (conversation_id,)).fetchone()
        blobs = [orjson.dumps(item) for item in items]
        added = sum(map(len, blobs))
        (held,) = self._db.execute("SELECT num_bytes FROM entries WHERE id = ?", (conversation_id,)).fetchone()
        self._check_size(held + added)
        self._make_room(added, 0, now_s, keep=conversation_id)
        self._insert_items(conversation_id, last + 1, items, blobs)
        self._db.execute(
            "UPDATE entries SET num_bytes = num_bytes + ?, expires_s = ? WHERE id = ?",
            (added, now_s + self._limits.ttl_s, conversation_id),
        )

    def delete_item(self, conversation_id: str, item_id: str, now_s: float) -> None:
        """Take an item out of a conversation."""
        self.conversation(conversation_id, now_s)
        if not self._db.execute("DELETE FROM items WHERE owner = ? AND id = ?", (conversation_id, item_id)).rowcount:
            raise NotFoundError(f"there is no item {item_id[:100]!r} in this conversation", param="item_id")

    # Both.

    def delete(self, entry_id: str, kind: str, now_s: float) -> None:
        """Forget a response or a conversation, with its items."""
        self._body(entry_id, kind, now_s)
        self._db.execute("DELETE FROM entries WHERE id = ?", (entry_id,))

    def resolve(self, items: Sequence[Item], now_s: float) -> list[Item]:
        """Items with references replaced by what they name.

        Raises:
            InvalidRequestError: A reference names nothing that is kept.
        """
        return [self._item(item["id"], now_s) if item["type"] == "item_reference" else item for item in items]

    def _item(self, item_id: str, now_s: float) -> Item:
        query = "SELECT items.body FROM items JOIN entries ON entries.id = owner WHERE items.id = ? AND expires_s > ?"
        row = self._db.execute(query, (item_id, now_s)).fetchone()
        if row is None:
            raise InvalidRequestError(f"input refers to the item {item_id[:100]!r}, which is not kept", param="input")
        found: Item = orjson.loads(row[0])
        return found

    def _body(self, entry_id: str, kind: str, now_s: float) -> dict[str, Any]:
        query = "SELECT body FROM entries WHERE id = ? AND kind = ? AND expires_s > ?"
        row = self._db.execute(query, (entry_id, kind, now_s)).fetchone()
        if row is None:
            raise NotFoundError(f"there is no {kind} {entry_id[:100]!r}; it may have expired", param=f"{kind}_id")
        found: dict[str, Any] = orjson.loads(row[0])
        return found

    def _items(self, owner: str) -> list[Item]:
        # Those before 0 are what it gave.
        rows = self._db.execute("SELECT body FROM items WHERE owner = ? AND position >= 0 ORDER BY position", (owner,))
        return [orjson.loads(body) for (body,) in rows]

    def _put(
        self,
        body: dict[str, Any],
        kind: str,
        items: Sequence[Item],
        *,
        status: str,
        now_s: float,
        previous_id: str | None = None,
        conversation_id: str | None = None,
    ) -> None:
        blob, blobs = orjson.dumps(body), [orjson.dumps(item) for item in items]
        num_bytes = len(blob) + sum(map(len, blobs))
        self._check_size(num_bytes)
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.execute("DELETE FROM entries WHERE id = ?", (body["id"],))
            self._make_room(num_bytes, 1, now_s, keep=conversation_id or "")
            row = (body["id"], kind, status, previous_id, conversation_id, now_s, now_s + self._limits.ttl_s, num_bytes, blob)
            self._db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            self._insert_items(body["id"], 0, items, blobs)
            # What it gave is found by its ids too.
            output = body.get("output", ())
            self._insert_items(body["id"], -len(output), output, [orjson.dumps(item) for item in output])
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _insert_items(self, owner: str, first: int, items: Sequence[Item], blobs: Sequence[bytes]) -> None:
        rows = [(owner, first + index, item["id"], blob) for index, (item, blob) in enumerate(zip(items, blobs, strict=True))]
        self._db.executemany("INSERT INTO items VALUES (?, ?, ?, ?)", rows)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._limits.max_bytes:
            limit = self._limits.max_bytes
            raise RequestTooLargeError(f"what is kept must be at most {limit} bytes (router.history_max_bytes); got {num_bytes}")

    def _make_room(self, num_bytes: int, num_entries: int, now_s: float, *, keep: str) -> None:
        """Forget what has expired, then the oldest, until so much more fits."""
        self._db.execute("DELETE FROM entries WHERE expires_s <= ?", (now_s,))
        count, held = self._db.execute("SELECT count(*), coalesce(sum(num_bytes), 0) FROM entries").fetchone()
        while count + num_entries > self._limits.max_entries or held + num_bytes > self._limits.max_bytes:
            row = self._db.execute("SELECT id, num_bytes FROM entries WHERE id != ? ORDER BY expires_s LIMIT 1", (keep,)).fetchone()
            if row is None:
                return
            self._db.execute("DELETE FROM entries WHERE id = ?", (row[0],))
            count, held = count - 1, held - row[1]
